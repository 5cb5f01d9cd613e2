"""Whether a candidate's numbers are right: against float64, by twice the unfused expression's error in the same dtype.

What is compared is what a clock would see: a call after several, and without dropout, where a graph can hold it, a
replay. A wrong result raises, and the benchmark prints no speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.peers import OURS, Layer, Step, capturable, fused_with_seed, on_backend
from benchmarks.timing import capture
from fused_lora.reference import Dropout, dropout_threshold

NAMES = ("y", "dx", "da", "db")
# Ours writes down at its second call what it repeats from its third on.
CALLS = 4
# Of torch's generator before each call.
SEED = 97
# Elements of an error that are held in float64 at once.
_CHUNK = 1 << 26


def mask_and_seed(layer: Layer) -> tuple[Tensor | None, float, Tensor]:
    """The dropout mask that a layer of ours draws after SEED, the probability to keep, and the mask's seed.

    Without dropout there is no mask.
    """
    torch.manual_seed(SEED)
    seed = torch.randint(0, 2**63 - 1, (1,), device=layer.x.device)
    threshold = dropout_threshold(layer.p)
    if threshold == 0:
        return None, 1.0, seed
    dropout = Dropout(seed, threshold)
    return dropout.mask(*layer.x.shape), dropout.keep_probability, seed


def update(layer: Layer, keep: Tensor | None, q: float) -> Tensor:
    """The low-rank term, [M, N], as loralib writes it."""
    dropped = layer.x if keep is None else layer.x * keep / q
    enabled = sum(layer.enable_lora)
    pairs = iter(zip(layer.lora_A.tensor_split(enabled), layer.lora_B.tensor_split(enabled), strict=True))
    width = len(layer.weight) // len(layer.enable_lora)
    slices = []
    for on in layer.enable_lora:
        if on:
            lora_A, lora_B = next(pairs)
            slices.append((dropped @ lora_A.T @ lora_B.T) * layer.scaling)
        else:
            slices.append(layer.x.new_zeros(len(layer.x), width))
    return slices[0] if len(slices) == 1 else torch.cat(slices, 1)


def unfused(layer: Layer, keep: Tensor | None, q: float) -> tuple[Tensor, ...]:
    """y, dx, da and db by plain autograd over the unfused expression, in the layer's dtypes."""
    with layer.autocast():
        y = layer.x @ layer.weight.T + update(layer, keep, q)
    return layer.gradients_of(y)


def exact(layer: Layer, keep: Tensor | None, q: float, rows: Tensor) -> tuple[Tensor, ...]:
    """y and dx at the given rows, da and db over all rows, in float64 by plain autograd."""
    weight = layer.weight.double()
    adapter = [t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B)]
    wide = replace(layer, x=layer.x.detach().double(), weight=weight, lora_A=adapter[0], lora_B=adapter[1])
    da, db = torch.autograd.grad(update(wide, keep, q), adapter, layer.dy.double())
    x = layer.x.detach()[rows].double().requires_grad_()
    some = replace(wide, x=x)
    y = x @ weight.T + update(some, None if keep is None else keep[rows], q)
    (dx,) = torch.autograd.grad(y, x, layer.dy[rows].double())
    return y.detach(), dx, da, db


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth|; NaN if there is one."""
    step = max(1, _CHUNK // max(1, truth[0].numel()))
    parts = [(a.double() - t).abs().max() for a, t in zip(actual.detach().split(step), truth.split(step), strict=True)]
    return float(torch.stack(parts).max())


def as_graph(step: Step) -> Step:
    """The step's results as its CUDA graph leaves them."""
    results: list[tuple[Tensor, ...]] = []
    graph = capture(lambda: results.append(step()))

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results[-1]

    return replay


def check(
    layer: Layer,
    candidates: dict[str, Step],
    *,
    ours: Sequence[str] = (OURS,),
    backends: Sequence[str] = ("auto",),
    rows: int | None = None,
) -> None:
    """Our function with a given mask, and every candidate; of others than ours, which draw unknown masks, without one.

    ours: the candidates that are layers of ours.
    backends: the paths of our function to check, by their names for `fused_lora.use_backend`.
    rows: compare y and dx at this many of the first and of the last rows only; None is all. da and db sum over all
    rows in any case. Raises AssertionError, naming the candidate and the result.
    """
    keep, q, seed = mask_and_seed(layer)
    tokens = len(layer.x)
    sample = torch.arange(tokens, device=layer.x.device)
    if rows is not None and 2 * rows < tokens:
        sample = torch.cat([sample[:rows], sample[-rows:]])
    truths = exact(layer, keep, q, sample)
    bounds = []
    for name, theirs, truth in zip(NAMES, unfused(layer, keep, q), truths, strict=True):
        # On tiny shapes torch happens to be exact; one rounding unit at the result's scale is allowed in any case.
        unit = torch.finfo(theirs.dtype).eps * float(truth.abs().max())
        bounds.append(2 * largest_error(_compared(name, theirs, sample), truth) + unit)
    fixed = fused_with_seed(layer, seed)
    known = {f"{OURS} with a given mask, {name}": on_backend(fixed, name) for name in backends}
    known |= {name: step for name, step in candidates.items() if layer.p == 0 or name in ours}

    def compare(candidate: str, step: Step) -> None:
        for _ in range(CALLS):
            torch.manual_seed(SEED)
            results = step()
        for name, actual, truth, bound in zip(NAMES, results, truths, bounds, strict=True):
            error = largest_error(_compared(name, actual, sample), truth)
            assert error <= bound, f"{candidate}: {name} is off by {error:.3e}, more than {bound:.3e}"

    for candidate, step in known.items():
        compare(candidate, step)
        if layer.p == 0 and layer.x.is_cuda and capturable(candidate, layer):
            compare(f"{candidate}, as a CUDA graph", as_graph(step))


def _compared(name: str, result: Tensor, sample: Tensor) -> Tensor:
    return result[sample] if name in ("y", "dx") else result
