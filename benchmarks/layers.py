"""python -m benchmarks.layers: MergedLinear, Embedding and Conv2d, forward + backward, against loralib's layers.

Both packages' layers are called as a user calls them, without CUDA graphs, since loralib's MergedLinear cannot be
captured (it indexes with a mask, which waits for the GPU). "frozen" is torch's own layer with a frozen weight. Checks
the outputs first; a wrong result prints no time. Writes layers.md, layers.json and layers.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import loralib
import torch
from torch import Tensor, nn

import fused_lora
from benchmarks.layer_cases import DTYPE, Case, check, prepared, step
from benchmarks.report import Progress, Results, header_of, parser, selected
from benchmarks.timing import measure

R, ALPHA = 16, 32


def merged_linear(name: str, in_features: int, out_features: int, tokens: int, fan_in_fan_out: bool) -> Case:
    def build(package: Any, p: float) -> nn.Module:
        options = {"r": R, "lora_alpha": ALPHA, "enable_lora": [True, False, True], "fan_in_fan_out": fan_in_fan_out}
        layer: nn.Module = package.MergedLinear(in_features, out_features, lora_dropout=p, **options)
        return layer

    return Case(
        f"MergedLinear {name} {in_features}→{out_features}",
        build,
        lambda: nn.Linear(in_features, out_features),
        lambda device: torch.randn(tokens, in_features, device=device, dtype=DTYPE, requires_grad=True),
    )


def embedding(name: str, num_embeddings: int, embedding_dim: int, tokens: int) -> Case:
    return Case(
        f"Embedding {name} {num_embeddings}x{embedding_dim}",
        lambda package, p: package.Embedding(num_embeddings, embedding_dim, r=R, lora_alpha=ALPHA),
        lambda: nn.Embedding(num_embeddings, embedding_dim),
        lambda device: torch.randint(num_embeddings, (8, tokens // 8), device=device),
        (0.0,),
    )


def conv(channels: int, kernel_size: int, size: int, batch: int) -> Case:
    def x(device: str) -> Tensor:
        return torch.randn(batch, channels, size, size, device=device, dtype=DTYPE, requires_grad=True)

    return Case(
        f"Conv2d {channels}→{channels} {kernel_size}x{kernel_size}, {batch}x{size}x{size}",
        lambda package, p: package.Conv2d(channels, channels, kernel_size, r=R, lora_alpha=ALPHA, padding="same"),
        lambda: nn.Conv2d(channels, channels, kernel_size, padding="same"),
        x,
        (0.0,),
    )


def cases(shrink: int) -> Iterator[Case]:
    """shrink divides every size."""
    tokens = 8192 // shrink
    yield merged_linear("GPT-2-medium QKV", 1024 // shrink, 3072 // shrink, tokens, fan_in_fan_out=True)
    yield merged_linear("Llama-8B QKV", 4096 // shrink, 12288 // shrink, tokens, fan_in_fan_out=False)
    yield embedding("GPT-2-medium", 50257 // shrink, 1024 // shrink, tokens)
    yield embedding("Llama-8B", 128256 // shrink, 4096 // shrink, tokens)
    for channels, kernel_size, size, batch in ((64, 3, 56, 64), (256, 3, 28, 64), (512, 3, 14, 64), (512, 1, 14, 16)):
        yield conv(max(16, channels // shrink), kernel_size, max(4, size // shrink), max(1, batch // shrink))


def steps_of(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """The frozen layer's, and of each dropout both packages' with the same parameters; ours is right if it is there."""
    torch.manual_seed(0)
    x = case.x(device)
    frozen = prepared(case.plain(), device)
    dy = torch.randn_like(frozen(x))
    steps: dict[str, Callable[[], object]] = {"frozen": step(frozen, x, dy)}
    for p in case.dropouts:
        theirs, ours = (prepared(case.build(package, p), device) for package in (loralib, fused_lora))
        ours.load_state_dict(theirs.state_dict())
        if p == 0:
            check(ours, theirs, x, dy, case.name)
            if device != "cpu":
                with fused_lora.use_backend("triton"):
                    check(ours, theirs, x, dy, f"{case.name}, by the kernels")
        steps |= {f"fused_lora, p={p}": step(ours, x, dy), f"loralib, p={p}": step(theirs, x, dy)}
    return steps


def main(arguments: list[str] | None = None) -> None:
    options_of = parser(__doc__, "layers")
    options_of.add_argument("--only", nargs="+", default=[""], help="layers whose name holds such a text")
    options_of.add_argument("--rounds", type=int, default=7)
    options_of.add_argument("--window", type=float, default=100.0, help="milliseconds")
    options_of.add_argument("--shrink", type=int, default=1, help="divide every size by this, to try the code")
    options = options_of.parse_args(arguments)
    chosen = selected(options_of, options.only, {case.name: case for case in cases(options.shrink)})
    say = Progress()
    title = "Forward + backward in sustained state, bfloat16, r=16, 8192 tokens, no CUDA graphs"
    results, rows = Results(title, header_of(options)), []
    for case in chosen:
        steps = steps_of(case, options.device)
        clock = {"graphs": False, "window_ms": options.window, "burst_rounds": 0, "device": options.device}
        timings = measure(steps, options.rounds, **clock)
        for name, timing in timings.items():
            ms, ratio = timing.sustained_ms, timing.sustained_ms / timings["frozen"].sustained_ms
            record = {"layer": case.name, "candidate": name, "sustained_ms": ms, "ratio": ratio}
            results.records.append(record | {"rounds_ms": timing.sustained})
            rows.append([case.name, name, f"{ms:.3f}", f"{ratio:.2f}"])
            say(" ".join(rows[-1]))
    results.table(["layer", "candidate", "ms", "ratio to frozen"], rows)
    results.write(options.output, options.name)


if __name__ == "__main__":
    main()
