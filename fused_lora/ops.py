"""What the ops of torch.library share: their library, the path each takes when it runs, and how they are registered.

A differentiable op has its autograd Function at its Autograd key, so that graphs and export see one op. Below that it
is made of ops without gradients, each with a fake, so that a compiled backward holds exactly the gradients that are
wanted. All of them choose their path when they run. Where nobody watches, `direct`, the same implementations are called
without their ops, which saves the dispatcher's time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .dispatch import Choice, autocasts, count

T = TypeVar("T")

lib = torch.library.Library("fused_lora", "DEF")
_MODULES = {
    "reference": ".reference",
    "triton": ".fused",
    "unfused": ".unfused",
    "decode": ".decoding",
    "batch_invariant": ".invariant",
}
_REPEATED = ("triton", "unfused", "decode")
_PLAIN = (Tensor, nn.Parameter)
_NOTHING: AbstractContextManager[Any] = nullcontext()


def module_of(op: str, choice: Choice) -> ModuleType:
    """The module of a path, each with the same functions, as far as it has them; the first use imports Triton."""
    count(op, choice.path)
    return _module(choice.path)


def repeated(
    choice: Choice,
    given: Sequence[Tensor | None],
    facts: tuple[Hashable, ...],
    call: Callable[[], T],
    keep: Callable[[Any], object] | None = None,
) -> T:
    """call's results; where kernels compute them, from a recording if there is one. See `fused.repeated`."""
    if choice.path not in _REPEATED:
        return call()
    return _module("triton").repeated(given, facts, call, keep)  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def _module(path: str) -> ModuleType:
    return import_module(_MODULES[path], __package__)


def direct(*tensors: Tensor | None) -> bool:
    """Whether an op would do nothing but call its implementation: nobody traces, and the tensors are plain ones.

    Those are what their memory says; torch hands ops what a view with its negative bit set, or a tensor of zeros that
    has no memory, stands for.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if forward_ad._current_level >= 0:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    # A generator's frames would take as long as all of the above.
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return True


def direct_gradients(dy: Tensor, *saved: Tensor | None) -> bool:
    """`direct` of a backward's tensors; its dy may be a batch of them (is_grads_batched), which has no memory."""
    return direct(dy, *saved) and not torch._C._functorch.is_legacy_batchedtensor(dy)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply where `direct` holds: without a look at functorch's transforms, of which there are none."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def here(tensor: Tensor) -> bool:
    """Whether it is on the current GPU."""
    return tensor.is_cuda and tensor.get_device() == torch._C._cuda_getDevice()


class _Once(torch.autograd.Function):
    """Gradients as they are, which depend on what they were computed of, but cannot be differentiated by it."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.detach() for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "A gradient of a fused_lora layer was to be differentiated; expected first derivatives alone."
        )


def once_differentiable(backward: Callable[[Any, Tensor | None], Any]) -> Callable[[Any, Tensor | None], Any]:
    """Makes a backward run without autocast, and its results raise if they are differentiated.

    It costs only where autocast is on, or a gradient's own gradient could be asked for.
    torch's decorator raises only where dy requires a gradient: results of a saved tensor that does would be taken for
    constants.
    """

    def guarded(ctx: Any, dy: Tensor | None) -> Any:
        with torch.no_grad(), _NOTHING if dy is None else without_autocast(dy):
            gradients = backward(ctx, dy)
        made = [gradient for gradient in gradients if gradient is not None]
        if not torch.is_grad_enabled() or not made:
            return gradients
        read = [t for t in (dy, *ctx.saved_tensors) if t is not None and t.is_floating_point()]
        given = iter(_Once.apply(len(made), *made, *read))
        return tuple(None if gradient is None else next(given) for gradient in gradients)

    @wraps(backward)
    def once(ctx: Any, dy: Tensor | None) -> Any:
        # The gradient's own gradient could be asked for, or an autocast region reaches into backward.
        watched = torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()
        return guarded(ctx, dy) if watched else backward(ctx, dy)

    return once


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a gradient with respect to one of these can be asked for later."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """For what is called within an autocast region of the tensor's device, which must not reach into it."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else _NOTHING


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the op of a schema, for every device."""
    name = schema.partition("(")[0]
    lib.define(schema)
    lib.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_lora::{name}", fake, lib=lib)


def make_differentiable(name: str, function: type[torch.autograd.Function]) -> None:
    """Puts an autograd Function over a registered op, entered only where a gradient can be asked for.

    It is also entered in forward mode, for which it raises.
    """
    op = getattr(torch.ops.fused_lora, name).default

    def differentiable(keyset: Any, *arguments: Any) -> Tensor:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        forward_mode = forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(t).tangent is not None for t in tensors
        )
        if forward_mode or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return function.apply(*arguments)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)  # type: ignore[no-any-return]

    lib.impl(name, differentiable, "Autograd", with_keyset=True)
