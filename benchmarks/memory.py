"""python -m benchmarks.memory: what one layer keeps for backward, and the most memory that a step takes.

"Saved" is what autograd's saved-tensor hooks see in one forward, each storage once and without parameters: the layer's
input x, which layers that are fed the same x share, and the rest. On a GPU, "held" is what is allocated after forward
beside what was there before (x among that) and y, and "peak" the most that a forward and backward allocate, y
included. Writes memory.md, memory.json and memory.csv.
"""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.accuracy import check
from benchmarks.linear import DROPOUTS
from benchmarks.peers import LORALIB, OURS, PEFT, Layer, fused, fused_module, loralib_module, peft_module
from benchmarks.report import Progress, Results, header_of, parser, selected

SHAPES = ((4096, 4096), (4096, 14336))
MIB = 2**20


def saved_bytes(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes that module(x) saves for backward: of x's storage, and of all others but parameters'."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Returning it keeps its storage alive, so that no address stands for two.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    of_x = sizes.pop(x.untyped_storage().data_ptr(), 0)
    del y
    return of_x, sum(sizes.values())


def held_and_peak(module: nn.Module, layer: Layer) -> tuple[int, int]:
    """Bytes allocated after a forward beside y and what was there before, and at most within forward and backward."""
    inputs = [layer.x, *(p for p in module.parameters() if p.requires_grad)]
    torch.autograd.grad(module(layer.x), inputs, layer.dy)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = module(layer.x)
    held = torch.cuda.memory_allocated() - before - y.nbytes
    gradients = torch.autograd.grad(y, inputs, layer.dy)
    torch.cuda.synchronize()
    del y, gradients
    return held, torch.cuda.max_memory_allocated() - before


def promised(layer: Layer) -> int:
    """What ours may save beside x: the panel, and with dropout one bit for each element of x and a seed."""
    (tokens, in_features), panel = layer.x.shape, layer.r * sum(layer.enable_lora)
    bits = tokens * -(-in_features // 8) + 8 if layer.p > 0 else 0
    return tokens * panel * layer.x.element_size() + bits


def frozen(layer: Layer) -> nn.Module:
    """torch's layer around the weight, without an adapter."""
    out_features, in_features = layer.weight.shape
    module = nn.Linear(in_features, out_features, bias=False, device="meta")
    module.weight = nn.Parameter(layer.weight, requires_grad=False)
    return module


def candidates(base: Layer, p: float) -> list[tuple[str, nn.Module, Layer]]:
    half = base.with_adapter(16, p, base.x.dtype)
    wide = base.with_adapter(16, p, torch.float32)
    return [
        ("frozen", frozen(half), half),
        (OURS, fused_module(half), half),
        (f"{OURS}, float32 adapter", fused_module(wide), wide),
        (LORALIB, loralib_module(half), half),
        (f"{PEFT}, float32 adapter", peft_module(wide), wide),
        (f"{PEFT}, bfloat16 adapter", peft_module(half, as_it_comes=False), half),
    ]


def record(name: str, module: nn.Module, layer: Layer, device: str) -> dict[str, Any]:
    of_x, rest = saved_bytes(module, layer.x)
    row: dict[str, Any] = {"shape": "→".join(map(str, reversed(layer.weight.shape))), "tokens": len(layer.x)}
    row |= {"candidate": name, "p": layer.p, "x_bytes": of_x, "saved_bytes": rest}
    row["saved_bits_per_element"] = 8 * rest / layer.x.numel()
    row["promised_bytes"] = promised(layer) if name.startswith(OURS) else None
    if device != "cpu":
        row["held_bytes"], row["peak_bytes"] = held_and_peak(module, layer)
    return row


def add_table(results: Results) -> None:
    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / MIB:.1f}"

    cells = []
    for row in results.records:
        kept = "-"
        if row["promised_bytes"] is not None:
            sign = "kept" if row["saved_bytes"] <= row["promised_bytes"] else "BROKEN"
            kept = f"≤ {mib(row['promised_bytes'])} {sign}"
        saved = [mib(row["x_bytes"]), mib(row["saved_bytes"]), kept, f"{row['saved_bits_per_element']:.2f}"]
        measured = [mib(row.get("held_bytes")), mib(row.get("peak_bytes"))]
        cells.append([row["shape"], f"{row['p']:g}", row["candidate"], *saved, *measured])
    columns = ["K→N", "p", "candidate", "saved: x", "saved: the rest", "promised", "bits of the rest per element of x"]
    results.table([*columns, "held after forward", "peak of a step"], cells)


def main(arguments: list[str] | None = None) -> None:
    options_of = parser(__doc__, "memory")
    options_of.add_argument("--tokens", type=int, default=8192)
    options_of.add_argument("--only", nargs="+", default=[""], help="shapes like 4096x14336; a part will do")
    options_of.add_argument("--shrink", type=int, default=1, help="divide K and N by this, to try the code")
    options = options_of.parse_args(arguments)
    say = Progress()
    title = f"Memory of one layer in training, MiB: bfloat16, {options.tokens} tokens, r=16"
    results = Results(title, header_of(options))
    shapes = selected(options_of, options.only, {f"{k}x{n}": (k, n) for k, n in SHAPES})
    for (in_features, out_features), p in product(shapes, DROPOUTS):
        sizes = options.tokens, in_features // options.shrink, out_features // options.shrink, 16, p
        base = Layer.random(*sizes, torch.bfloat16, device=options.device)
        check(base, {OURS: fused(base)}, rows=128)
        for name, module, layer in candidates(base, p):
            row = record(name, module, layer, options.device)
            results.records.append(row)
            saved = f"{(row['x_bytes'] + row['saved_bytes']) / MIB:.1f} MiB saved"
            peak = f", peak {row['peak_bytes'] / MIB:.1f} MiB" if "peak_bytes" in row else ""
            say(f"{row['shape']} p={p:g} {name}: {saved}{peak}")
    add_table(results)
    results.write(options.output, options.name)


if __name__ == "__main__":
    main()
