"""Which path computes a LoRA layer, and why: arithmetic on devices and dtypes, no kernels.

The request ("auto", "reference" or "triton") is read where the public function is called and travels with the op, so
that backward takes the path forward took, on whichever thread it runs.
"""

from __future__ import annotations

import os
import threading
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

Backend = Literal["auto", "reference", "triton"]


@dataclass(frozen=True)
class Choice:
    """A path ("linear", "reference" or "triton") and the reason for it, in words."""

    path: Literal["linear", "reference", "triton"]
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _Forced(threading.local):
    # Dynamo guards on a thread-local's attribute and not on a ContextVar, so a compiled function follows it.
    backend: Backend | None = None


_forced = _Forced()
_counters: list[Counter[str]] = []


def requested_backend() -> Backend:
    """The backend of the innermost `use_backend`, else of FUSED_LORA_BACKEND, else "auto".

    Raises ValueError if the environment variable names no backend.
    """
    if _forced.backend is not None:
        return _forced.backend
    return _checked(os.environ.get("FUSED_LORA_BACKEND", "auto"), "FUSED_LORA_BACKEND")


def _checked(name: str, source: str) -> Backend:
    for backend in get_args(Backend):
        if name == backend:
            return backend  # type: ignore[no-any-return]
    raise ValueError(f"{source} is {name!r}; expected one of {', '.join(get_args(Backend))}.")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within the block, and in backwards of what it computes, this thread's layers take the given path.

    backend: "reference" (plain PyTorch), "triton" (the kernels; raises where they cannot run) or "auto".
    Raises ValueError for any other name.
    """
    checked = _checked(backend, "backend")
    previous, _forced.backend = _forced.backend, checked
    try:
        yield
    finally:
        _forced.backend = previous


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


def path_for(op: str, request: str, tensor: Tensor, adapter_dtype: torch.dtype) -> Literal["reference", "triton"]:
    """The path that `op` takes on this tensor. Warns once per reason where a GPU falls back to the reference.

    Raises RuntimeError if the request is "triton" and the kernels cannot run.
    """
    obstacle = _obstacle(tensor.device, tensor.dtype, adapter_dtype)
    if obstacle is not None and request == "triton":
        raise RuntimeError(f"The backend is forced to triton, but {obstacle}; expected a case the kernels take.")
    if obstacle is not None and request == "auto" and tensor.is_cuda:
        _warn_once(f"fused_lora uses the unfused reference path because {obstacle}.")
    path: Literal["reference", "triton"] = "reference" if obstacle or request == "reference" else "triton"
    for counter in _counters:
        counter[f"{op}/{path}"] += 1
    return path


@lru_cache(maxsize=256)
def _obstacle(device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run here; None if they can."""
    return "this version has no kernels yet"


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def explain(layer: nn.Module, x: Tensor) -> Choice:
    """Says which path `layer(x)` would take now, and why, without computing anything.

    layer: a fused_lora layer. x: its input, any shape; only device and dtype are read.
    Raises TypeError if layer is no LoRA layer.
    """
    r, merged = getattr(layer, "r", None), getattr(layer, "merged", None)
    if r is None or merged is None:
        raise TypeError(f"layer is a {type(layer).__name__}; expected a fused_lora layer.")
    if r == 0:
        return Choice("linear", "r is 0, so this is a plain layer")
    if merged:
        return Choice("linear", "the adapter is merged into the weight")
    dtype, adapter_dtype = x.dtype, layer.lora_A.dtype  # type: ignore[union-attr]
    if autocast_dtype(x.device.type) is not None and dtype != torch.float64:
        dtype = autocast_dtype(x.device.type)  # type: ignore[assignment]
    request = requested_backend()
    if request == "reference":
        return Choice("reference", "it was asked for (use_backend or FUSED_LORA_BACKEND)")
    obstacle = _obstacle(x.device, dtype, adapter_dtype)  # type: ignore[arg-type]
    if obstacle is not None:
        return Choice("reference", obstacle)
    return Choice("triton", f"the kernels take {dtype} on {x.device}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast would compute in on this kind of device; None where it is off or unknown."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def triton_is_installed() -> bool:
    return find_spec("triton") is not None
