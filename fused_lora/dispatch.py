"""Which path computes a LoRA layer, and why, as far as requests, devices and dtypes decide it.

What sizes decide of linear layers is in linear_choice.py.

The request (a backend, or BATCH_INVARIANT) is read where the public function is called and travels with the op, so that
backward chooses by the one that forward chose by, on whichever thread it runs.
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
from torch import Tensor

Backend = Literal["auto", "reference", "triton", "unfused", "decode"]
_BACKENDS = get_args(Backend)
# What a request is called within `batch_invariant`, whatever the backend.
BATCH_INVARIANT = "batch_invariant"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """A path and the reason for it, in words.

    "plain": torch's own layer. "reference": the mathematics in plain PyTorch. "triton": the fused kernels, but for the
    largest panels of many ranks, which are cuBLAS's. "unfused": cuBLAS for the large products, kernels for panels,
    masks and few rows' gradients of the adapter. "decode": one kernel for the whole of a linear layer's forward, and
    for most of its backward. "batch_invariant": that forward with tiles that no number of rows changes, or row by row
    where it cannot run.
    """

    path: Literal["plain", "reference", "triton", "unfused", "decode", "batch_invariant"]
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


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

    backend: "reference" (plain PyTorch), "triton" (the fused kernels), "unfused" (torch's GEMMs, kernels for panels and
        masks), "decode" (one kernel for a linear layer's forward, and for its backward to x), or "auto". A lookup and
        an effective weight take "unfused" as "triton", and all but linear layers "decode". Raises where the kernels
        cannot run but must.
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
    "triton", "unfused" or "decode" and the kernels cannot run. A CPU takes the kernels only on request, in Triton's
    interpreter.
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


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast would compute in on this kind of device; None where it is off or unknown."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    # Mostly it is off everywhere, which takes the least time to see.
    return torch._C._is_any_autocast_enabled() and autocast_dtype(tensor.device.type) is not None
