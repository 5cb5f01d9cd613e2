"""What the ops of torch.library share: their library, the path each takes when it runs, and how they are registered.

A differentiable op has its autograd Function at its Autograd key, so that graphs and export see one op. Below that it
is made of ops without gradients, each with a fake, so that a compiled backward holds exactly the gradients that are
wanted. All of them choose their path (reference or kernels) when they run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import autocast_dtype, choose, count

lib = torch.library.Library("fused_lora", "DEF")


def path_of(op: str, backend: str, tensor: Tensor, adapter_dtype: torch.dtype) -> ModuleType:
    """reference.py or fused.py, which have the same functions; Triton is imported when it is first needed."""
    path = choose(backend, tensor.device, tensor.dtype, adapter_dtype).path
    count(op, path)
    if path == "reference":
        return reference
    from . import fused

    return fused


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """For a backward that is called within an autocast region, which must not reach into it."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the op of a schema, for every device."""
    name = schema.partition("(")[0]
    lib.define(schema)
    lib.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_lora::{name}", fake, lib=lib)


def make_differentiable(name: str, function: type[torch.autograd.Function]) -> None:
    """Puts an autograd Function over a registered op; it is entered only where a gradient can be asked for."""
    op = getattr(torch.ops.fused_lora, name).default

    def differentiable(keyset: Any, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return function.apply(*arguments)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)  # type: ignore[no-any-return]

    lib.impl(name, differentiable, "Autograd", with_keyset=True)
