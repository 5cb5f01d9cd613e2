"""python -m benchmarks.layers: MergedLinear, Embedding and Conv2d, forward + backward, against loralib's layers.

Both packages' layers are called as a user calls them, without CUDA graphs, since loralib's MergedLinear cannot be
captured (it indexes with a mask, which waits for the GPU). "frozen" is torch's own layer with a frozen weight. Checks
the outputs first; a wrong result prints no time. Writes layers.json and layers.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loralib
import torch
from torch import Tensor, nn

import fused_lora
from benchmarks.accuracy import CALLS
from benchmarks.timing import machine_header, markdown_table, measure

DTYPE = torch.bfloat16


@dataclass
class Case:
    """A layer to build from either package, its input, and torch's frozen layer of the same shape."""

    name: str
    build: Callable[[Any, float], nn.Module]
    plain: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    dropouts: tuple[float, ...] = (0.0,)


def merged_linear(name: str, in_features: int, out_features: int, fan_in_fan_out: bool) -> Case:
    def build(package: Any, p: float) -> nn.Module:
        options = {"r": 16, "lora_alpha": 32, "enable_lora": [True, False, True], "fan_in_fan_out": fan_in_fan_out}
        layer: nn.Module = package.MergedLinear(in_features, out_features, lora_dropout=p, **options)
        return layer

    return Case(
        f"MergedLinear {name} {in_features}→{out_features}",
        build,
        lambda: nn.Linear(in_features, out_features),
        lambda: torch.randn(8192, in_features, device="cuda", dtype=DTYPE, requires_grad=True),
        (0.0, 0.1),
    )


def embedding(name: str, num_embeddings: int, embedding_dim: int) -> Case:
    return Case(
        f"Embedding {name} {num_embeddings}x{embedding_dim}",
        lambda package, p: package.Embedding(num_embeddings, embedding_dim, r=16, lora_alpha=32),
        lambda: nn.Embedding(num_embeddings, embedding_dim),
        lambda: torch.randint(num_embeddings, (8, 1024), device="cuda"),
    )


def conv(channels: int, kernel_size: int, size: int, batch: int) -> Case:
    return Case(
        f"Conv2d {channels}→{channels} {kernel_size}x{kernel_size}, {batch}x{size}x{size}",
        lambda package, p: package.Conv2d(channels, channels, kernel_size, r=16, lora_alpha=32, padding="same"),
        lambda: nn.Conv2d(channels, channels, kernel_size, padding="same"),
        lambda: torch.randn(batch, channels, size, size, device="cuda", dtype=DTYPE, requires_grad=True),
    )


CASES = [
    merged_linear("GPT-2-medium QKV", 1024, 3072, fan_in_fan_out=True),
    merged_linear("Llama-8B QKV", 4096, 12288, fan_in_fan_out=False),
    embedding("GPT-2-medium", 50257, 1024),
    embedding("Llama-8B", 128256, 4096),
    conv(64, 3, 56, 64),
    conv(256, 3, 28, 64),
    conv(512, 3, 14, 64),
    conv(512, 1, 14, 16),
]


def on_gpu(layer: nn.Module) -> nn.Module:
    """In bfloat16 on the GPU with a frozen base; loralib leaves what is no parameter where it was."""
    layer = layer.to("cuda", DTYPE)
    if hasattr(layer, "lora_ind") and not isinstance(layer, fused_lora.LoRALayer):
        layer.lora_ind = layer.lora_ind.cuda()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad = "lora_" in name
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], list[Tensor]]:
    inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
    if not inputs:
        return lambda: [layer(x)]

    def forward_backward() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    return forward_backward


def check(ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor, what: str) -> None:
    """A call after several against loralib's layer in float64, by twice loralib's error in this dtype; at p = 0."""
    exact = copy.deepcopy(theirs).double()
    wide = x.detach().double().requires_grad_() if x.is_floating_point() else x
    for _ in range(CALLS - 1):
        step(ours, x, dy)()
    results = [step(layer, t, g)() for layer, t, g in ((ours, x, dy), (theirs, x, dy), (exact, wide, dy.double()))]
    for i, (actual, same_dtype, truth) in enumerate(zip(*results, strict=True)):
        error, bound = (actual - truth).abs().max(), 2 * (same_dtype - truth).abs().max()
        assert error <= bound, f"result {i} of {what} is off by {error:.3e}, more than {bound:.3e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--commit", help="what to write in the header; default: git describe")
    options = parser.parse_args()
    header = machine_header(options.commit)
    records, rows = [], []
    for case in CASES:
        if options.only not in case.name:
            continue
        torch.manual_seed(0)
        x = case.x()
        plain = on_gpu(case.plain())
        dy = torch.randn_like(plain(x))
        steps: dict[str, Callable[[], object]] = {"frozen": step(plain, x, dy)}
        for p in case.dropouts:
            theirs = on_gpu(case.build(loralib, p))
            ours = on_gpu(case.build(fused_lora, p))
            ours.load_state_dict(theirs.state_dict())
            if p == 0:
                check(ours, theirs, x, dy, case.name)
                with fused_lora.use_backend("triton"):
                    check(ours, theirs, x, dy, f"{case.name}, by the kernels")
            steps |= {f"fused_lora, p={p}": step(ours, x, dy), f"loralib, p={p}": step(theirs, x, dy)}
        timings = measure(steps, graphs=False)
        floor = timings["frozen"].sustained_ms
        for name, timing in timings.items():
            ms = timing.sustained_ms
            record = {"layer": case.name, "candidate": name, "sustained_ms": ms, "ratio": ms / floor, **vars(timing)}
            records.append(record)
            rows.append([case.name, name, f"{ms:.3f}", f"{ms / floor:.2f}"])
    title = "Forward + backward in sustained state, bfloat16, r=16, 8192 tokens, no CUDA graphs"
    table = markdown_table(["layer", "candidate", "ms", "ratio to frozen"], rows)
    facts = ", ".join(f"{name} {value}" for name, value in header.items())
    text = f"{title}\n\n{facts}\n\n{table}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "layers.md").write_text(text)
    (options.output / "layers.json").write_text(json.dumps({"header": header, "records": records}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
