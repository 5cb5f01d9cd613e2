"""Which path computes a LoRA layer, and why: arithmetic on devices, dtypes, sizes and the kernels' tables of tiles.

The request ("auto", "reference" or "triton") is read where the public function is called and travels with the op, so
that backward takes the path forward took, on whichever thread it runs.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Backend = Literal["auto", "reference", "triton", "unfused", "decode"]
_BACKENDS = get_args(Backend)
# What a request is called within `batch_invariant`, whatever the backend.
BATCH_INVARIANT = "batch_invariant"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """A path and the reason for it, in words.

    "plain": torch's own layer. "reference": the mathematics in plain PyTorch. "triton": the fused kernels. "unfused":
    cuBLAS for every product, kernels for the masks. "decode": one kernel for the whole of a linear layer's forward, and
    for most of its backward. "batch_invariant": that forward with tiles that no number of rows changes, or row by row
    where it cannot run.
    """

    path: Literal["plain", "reference", "triton", "unfused", "decode", "batch_invariant"]
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


# Measured on Hopper; see benchmarks/NOTES.md.
_FEWEST_ROWS = 2048
_FEWEST_OUTPUTS = 1 << 21
# Of a layer that trains, with more ranks in a slice than the first of these. And the elements of the largest lora_A of
# so many ranks which one launch reads for more than _FEW_DECODED rows.
_MANY_RANKS, _FEWEST_ROWS_OF_MANY_RANKS, _LARGEST_DECODED_FACTOR = 64, 4096, 1 << 19
# Rows of a forward without a mask on Hopper, and of whatever else is bound by reading the weight.
_UNMASKED_DECODED, _FEW_DECODED = 512, 64
# Of a forward alone, on Hopper, with more rows: no fewer outputs, and with less than _FEWEST_ROWS no more; of rows and
# outputs together less than the last.
_FEWEST_DECODED_OUTPUTS, _MOST_DECODED_OUTPUTS, _TOO_MUCH_DECODED = 2048, 8192, 1 << 25
# Which part of the multiprocessors that launch must keep busy.
_BUSY = 0.8
_FEWEST_ROWS_OF_FEW_OUTPUTS = 4096
# Of rows and outputs together, of a forward alone; with fewer, one launch takes as little time as two that compute the
# panel in the first wave.
_FEWEST_OUTPUTS_OF_WAVES = 1 << 24
_FEW_ROWS = Choice("unfused", f"cuBLAS takes less time for fewer than {_FEWEST_ROWS} rows")
_FEW_ROWS_OF_MANY_RANKS = Choice(
    "unfused",
    f"cuBLAS takes less time for fewer than {_FEWEST_ROWS_OF_MANY_RANKS} rows of more than {_MANY_RANKS} ranks",
)
_FEW_TILES = Choice("unfused", "cuBLAS takes less time where the output, or the input's gradient, has few tiles")
_WIDE = Choice("unfused", "cuBLAS takes less time for float32")
_ODD = Choice("unfused", "cuBLAS takes less time for sizes that are no multiples of 16")
_FEW_DECODED_ROWS = Choice("decode", "one launch takes less time for few rows")
_DECODED_ALONE = Choice("decode", "one launch takes less time where no gradient is wanted")
_FEW_OUTPUTS = Choice("triton", "outputs are so few that each tile computes its own panel")
_ASKED_TO_DECODE = Choice("decode", "it was asked for, by use_backend or FUSED_LORA_BACKEND")
_INVARIANT = Choice("batch_invariant", "batch_invariant() is in force")

# For the whole process, as torch's own backend flags are: activation checkpointing runs forward again on autograd's
# threads. Dynamo guards on a module's globals, so that compiled functions follow it.
_forced: Backend | None = None
invariant_blocks = 0
_counters: list[Counter[str]] = []


def requested_backend() -> str:
    """The backend of the innermost `use_backend`, else of FUSED_LORA_BACKEND, else "auto"; or BATCH_INVARIANT.

    Raises ValueError if the environment variable names no backend.
    """
    if invariant_blocks:
        return BATCH_INVARIANT
    if _forced is not None:
        return _forced
    return _checked(os.environ.get("FUSED_LORA_BACKEND", "auto"), "FUSED_LORA_BACKEND")


def _checked(name: str, source: str) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(_BACKENDS)}.")
    return name  # type: ignore[return-value]


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within the block, and in the backward of what it computes, every layer of the process takes the given path.

    backend: "reference" (plain PyTorch), "triton" (the fused kernels), "unfused" (torch's GEMMs, kernels for masks),
        "decode" (one kernel for a linear layer's forward, and for its backward to x), or "auto". All but linear layers
        take "unfused" as "triton"; "decode" is that wherever else. Raises where the kernels cannot run but must.
    Raises ValueError for any other name.
    """
    global _forced
    previous, _forced = _forced, _checked(backend, "backend")
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within the block, a row of a linear layer's output has the same bits whatever other rows stand beside it.

    Holds for every Linear and MergedLinear of the process, merged ones and those without adapter included, and for any
    number of rows; other layers are as they were. On a GPU one kernel computes them, with the tiles of a single row, on
    the CPU each row is computed by itself: that costs time. Backward passes are not invariant. A layer whose dropout is
    in force raises RuntimeError, since a mask depends on where a row stands.
    """
    global invariant_blocks
    invariant_blocks += 1
    try:
        yield
    finally:
        invariant_blocks -= 1


@contextmanager
def count_paths() -> Iterator[Counter[str]]:
    """Counts, for every thread while the block runs, how often each op took each path.

    Keys are "<op>/<path>", for instance "forward/triton".
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def counted() -> bool:
    """Whether a `count_paths` is in force."""
    return bool(_counters)


def count(op: str, path: str) -> None:
    for counter in _counters:
        counter[f"{op}/{path}"] += 1


@lru_cache(maxsize=256)
def choose(request: str, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Choice:
    """The path for these tensors: the kernels wherever they run, the reference elsewhere.

    Warns, once per reason, where a GPU falls back to the reference unasked. Raises RuntimeError if the request is
    "triton" or "unfused" and the kernels cannot run. A CPU takes the kernels only on request, in Triton's interpreter.
    """
    if request == "reference":
        return Choice("reference", "it was asked for, by use_backend or FUSED_LORA_BACKEND")
    obstacle = obstacle_to_kernels(device, dtype, adapter_dtype)
    if request == BATCH_INVARIANT:
        request = "auto"
    if request != "auto" and obstacle is not None:
        raise RuntimeError(f"The backend is forced to {request}, but {obstacle}; expected a case the kernels take.")
    if request == "auto" and obstacle is None and device.type == "cpu":
        return Choice("reference", "x is on the CPU, where the kernels run only in Triton's interpreter and on request")
    if request == "unfused":
        return Choice("unfused", "it was asked for, by use_backend or FUSED_LORA_BACKEND")
    if obstacle is None:
        return Choice("triton", f"the kernels take {dtype} with {adapter_dtype} adapters on {device}")
    if device.type == "cuda":
        _warn_once(f"fused_lora takes the unfused reference path because {obstacle}.")
    return Choice("reference", obstacle)


@lru_cache(maxsize=1024)
def choose_linear(
    request: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rows: int,
    *features: int,
    trained_r: int = 0,
) -> Choice:
    """The path of a linear layer, or its backward, for this many rows and between these numbers of features.

    Where both would run, the kernels or cuBLAS, whichever takes less time; as measured in benchmarks/NOTES.md.
    trained_r: ranks in a slice of a layer that trains.
    """
    choice = choose(request, device, dtype, adapter_dtype)
    if request != "auto" or choice.path != "triton":
        return choice
    if rows < _FEWEST_ROWS:
        return _FEW_ROWS
    if trained_r > _MANY_RANKS and rows < _FEWEST_ROWS_OF_MANY_RANKS:
        return _FEW_ROWS_OF_MANY_RANKS
    if rows * min(features) < _FEWEST_OUTPUTS:
        return _FEW_TILES
    if dtype == torch.float32:
        return _WIDE
    return _ODD if any(size % 16 != 0 for size in features) else choice


@lru_cache(maxsize=1024)
def choose_forward(
    request: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rows: int,
    in_features: int,
    out_features: int,
    *,
    ranks: int,
    r: int = 0,
    drops: bool,
    trains: bool,
) -> Choice:
    """The path of a linear layer's forward, which draws a mask or not, and keeps something for a backward or not.

    ranks: of all its slices together; r: of one, or 0 for few. As measured in benchmarks/NOTES.md.
    """
    if request == BATCH_INVARIANT:
        return _INVARIANT
    choice = choose_linear(
        request, device, dtype, adapter_dtype, rows, in_features, out_features, trained_r=r if trains else 0
    )
    if not _decodes(request, choice, dtype, in_features, out_features):
        return choice
    if request == "decode":
        return _ASKED_TO_DECODE
    if drops or torch.cuda.get_device_capability(device) != (9, 0):
        return _FEW_DECODED_ROWS if rows <= _FEW_DECODED else choice
    from .kernels import decode_tiles, first_wave, own_panel

    sizes = rows, in_features, out_features
    if ranks <= own_panel.MOST_RANKS and own_panel.tile_of(device, dtype, *sizes):
        return _FEW_OUTPUTS
    if rows * out_features >= _FEWEST_OUTPUTS_OF_WAVES and first_wave.first_wave(device, dtype, *sizes, ranks):
        return choice
    busy = decode_tiles.kept_busy(device, rows, out_features) >= _BUSY
    if rows > _FEW_DECODED and ranks > _MANY_RANKS and ranks * in_features > _LARGEST_DECODED_FACTOR:
        return choice
    if rows <= _UNMASKED_DECODED:
        return _FEW_DECODED_ROWS if busy else choice
    if trains or rows * out_features >= _TOO_MUCH_DECODED:
        return choice
    most = _MOST_DECODED_OUTPUTS if rows < _FEWEST_ROWS else out_features
    if busy and _FEWEST_DECODED_OUTPUTS <= out_features <= most:
        return _DECODED_ALONE
    few = out_features < _FEWEST_DECODED_OUTPUTS and rows < _FEWEST_ROWS_OF_FEW_OUTPUTS
    return _FEW_TILES if few else choice


@lru_cache(maxsize=1024)
def choose_backward(
    request: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rows: int,
    *features: int,
    r: int = 0,
    plain: bool,
) -> Choice:
    """The path of its backward; plain: whether dx is wanted, of a layer with one adapter for all outputs.

    r: ranks in a slice, or 0 for few.
    """
    choice = choose_linear(request, device, dtype, adapter_dtype, rows, *features, trained_r=r)
    if not plain or not _decodes(request, choice, dtype, *features):
        return choice
    if request == "decode":
        return _ASKED_TO_DECODE
    # Nowhere else was it measured.
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return _FEW_DECODED_ROWS if hopper and rows <= _FEW_DECODED else choice


def _decodes(request: str, choice: Choice, dtype: torch.dtype, *features: int) -> bool:
    """Whether one launch for the most of it can be what takes the least time, or was asked for."""
    if choice.path == "reference" or request not in ("auto", "decode"):
        return False
    return request == "decode" or (dtype.itemsize == 2 and not any(size % 16 for size in features))


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def obstacle_to_kernels(device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run here; None if they can."""
    if dtype not in _KERNEL_DTYPES or adapter_dtype not in (dtype, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {dtype} with {adapter_dtype} adapters"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"x is on {device}, not on a CUDA GPU"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'fused-lora[triton]')"
    if interpreted:
        return None
    if torch.version.hip is not None:
        return "this is a ROCm build of torch, for which the kernels were never tested"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]} and the kernels need 8.0"
    return None


def explain(layer: nn.Module, x: Tensor) -> Choice:
    """Says which path `layer(x)` would take now, and why, without computing anything.

    layer: a fused_lora layer. x: its input; only shape, device and dtype are read. A convolution itself is torch's
    in any case; the path is that of its effective weight.
    Raises TypeError if layer is no LoRA layer, and what the call itself would raise for a forced path.
    """
    r, merged, lora_A = (getattr(layer, name, None) for name in ("r", "merged", "lora_A"))
    if r is None or merged is None:
        raise TypeError(f"layer is a {type(layer).__name__}; expected a fused_lora layer.")
    if invariant_blocks and isinstance(layer, nn.Linear):
        return _INVARIANT
    if lora_A is None:
        return Choice("plain", "this layer has no adapter")
    if merged:
        return Choice("plain", "the adapter is merged into the weight")
    if not isinstance(layer, nn.Linear):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return choose(requested_backend(), weight.device, weight.dtype, lora_A.dtype)
    cast = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
    adapter_dtype = lora_A.dtype if cast is None or lora_A.dtype == torch.float32 else cast
    rows = x.numel() // max(1, layer.in_features)
    features = layer.in_features, layer.out_features
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *layer.parameters()))
    dropout = layer.lora_dropout
    # With a probability of 1 there is no term to mask.
    drops = isinstance(dropout, nn.Dropout) and dropout.training and 0 < dropout.p < 1
    dtypes = cast or x.dtype, adapter_dtype
    kind = {"ranks": len(lora_A), "r": r, "drops": drops, "trains": wants_gradient}
    return choose_forward(requested_backend(), x.device, *dtypes, rows, *features, **kind)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast would compute in on this kind of device; None where it is off or unknown."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    # Mostly it is off everywhere, which takes the least time to see.
    return torch._C._is_any_autocast_enabled() and autocast_dtype(tensor.device.type) is not None
