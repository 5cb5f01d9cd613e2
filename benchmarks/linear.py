"""python -m benchmarks.linear: one layer's forward + backward (y, dx, dA, dB) against the bare frozen layer.

Checks every candidate's outputs first; a wrong result prints no time. Writes linear.json and linear.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import fused_lora
from benchmarks.peers import PEERS, Layer, bare, fused
from benchmarks.timing import machine_header, markdown_table, measure
from fused_lora.reference import Dropout, dropout_threshold

SHAPES = [(4096, 4096), (4096, 14336)]
NAMES = ("y", "dx", "dA", "dB")


def expression(layer: Layer, keep: torch.Tensor | None, q: float) -> torch.Tensor:
    dropped = layer.x if keep is None else layer.x * keep / q
    return layer.x @ layer.weight.T + (dropped @ layer.lora_A.T @ layer.lora_B.T) * layer.scaling


def check(layer: Layer) -> None:
    """Every candidate against float64, by twice the error of the unfused expression in the same dtype.

    Candidates that draw torch's own masks can be checked at p = 0 only. Raises AssertionError for a wrong result.
    """
    seed = torch.tensor([97], device="cuda")
    dropout = Dropout(seed, dropout_threshold(layer.p)) if layer.p > 0 else None
    keep, q = (None, 1.0) if dropout is None else (dropout.mask(*layer.x.shape), dropout.keep_probability)
    wide = Layer(
        *(t.detach().double().requires_grad_() for t in (layer.x, layer.weight, layer.lora_A, layer.lora_B)),
        dy=layer.dy.double(),
        scaling=layer.scaling,
        p=layer.p,
    )
    exact = wide.gradients_of(expression(wide, keep, q))
    same_dtype = layer.gradients_of(expression(layer, keep, q))
    with fused_lora.use_backend("triton"):
        results = {"fused_lora": fused(layer, seed)()}
    if layer.p == 0:
        results |= {name: make(layer)() for name, make in PEERS.items()}
    for candidate, tensors in results.items():
        for name, actual, theirs, truth in zip(NAMES, tensors, same_dtype, exact, strict=True):
            error, bound = (actual - truth).abs().max(), 2 * (theirs - truth).abs().max()
            assert error <= bound, f"{candidate}'s {name} is off by {error:.3e}, more than {bound:.3e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="what to write in the header; default: git describe")
    options = parser.parse_args()
    header = machine_header(options.commit)
    records, rows = [], []
    for in_features, out_features in SHAPES:
        steps = {}
        for p in (0.0, 0.1):
            layer = Layer.random(options.tokens, in_features, out_features, options.r, p, torch.bfloat16)
            check(layer)
            steps["bare GEMMs"] = bare(layer)
            steps |= {f"{name}, p={p}": make(layer) for name, make in PEERS.items()}
        timings = measure(steps)
        floor = timings["bare GEMMs"]
        for name, timing in timings.items():
            ratio, burst = timing.sustained_ms / floor.sustained_ms, timing.burst_ms / floor.burst_ms
            shape = f"{in_features}→{out_features}"
            record = {"shape": shape, "tokens": options.tokens, "r": options.r, "candidate": name, **vars(timing)}
            records.append(record | {"sustained_ratio": ratio, "burst_ratio": burst})
            rows.append([shape, name, f"{timing.sustained_ms:.3f}", f"{ratio:.3f}", f"{burst:.3f}"])
    columns = ["K→N", "candidate", "sustained, ms", "ratio to bare, sustained", "ratio to bare, burst"]
    title = f"Forward + backward, bfloat16, {options.tokens} tokens, r={options.r}, CUDA-graph replays"
    table = markdown_table(columns, rows)
    facts = ", ".join(f"{name} {value}" for name, value in header.items())
    options.output.mkdir(parents=True, exist_ok=True)
    text = f"{title}\n\n{facts}\n\n{table}\n"
    (options.output / "linear.md").write_text(text)
    (options.output / "linear.json").write_text(json.dumps({"header": header, "records": records}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
