"""Calls that were made before, made again without the way there: of linear layers, and of effective weights.

On that way arguments are checked, a path is chosen and sizes are computed, which takes the host longer than the launch
that comes of it. All of that follows from what `key_of` and `weight_key_of` hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import linear_op
from .dispatch import choose, counted
from .kernels.lookup import instrumentation, tiles_in_force, watched
from .linear_choice import choose_forward
from .ops import direct, here

if TYPE_CHECKING:
    from .kernels.replay import Keep, Program

# Of x, weight (whichever way it is stored), bias, lora_A, lora_B and, if a mask is drawn, its seed; or of weight,
# lora_A, lora_B and what is known.
Call = Callable[..., Tensor]

_MOST_CALLS = 2048
# None where there is no shorter way.
_calls: OrderedDict[Hashable, Call | None] = OrderedDict()


def key_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    backend: str,
    trains: bool,
    numbers: tuple[float, float, int, int],
    flags: tuple[bool, ...],
) -> Hashable:
    """What determines how y is computed; None where more does.

    backend: as requested. trains: whether y will be differentiated. numbers: scaling, dropout_p and both offsets.
    flags: all else that is no tensor.
    """
    # Dynamo, which is told by `direct`, cannot trace what follows it.
    if not direct(x, weight, bias, lora_A, lora_B):
        return None
    if not here(x) or counted() or torch._C._is_any_autocast_enabled():
        return None
    # A tensor among them is found by what it is, not by what it holds.
    scaling, dropout_p, row_offset, column_offset = numbers
    if type(scaling) is not float or type(dropout_p) not in (float, int):
        return None
    if type(row_offset) is not int or type(column_offset) is not int:
        return None
    for flag in flags:
        if type(flag) is not bool:
            return None
    if trains and (x.dtype.itemsize != 2 or watched() or tiles_in_force()):
        return None
    if trains and not (x.dim() == 2 or (x.dim() > 2 and x.is_contiguous())):
        return None
    return (
        backend, trains, *numbers, *flags, instrumentation(),
        x.dtype, x.shape, x.stride(), x.get_device(), x.data_ptr() % 16,
        weight.dtype, weight.shape, weight.stride(), weight.get_device(), weight.data_ptr() % 16,
        lora_A.dtype, lora_A.shape, lora_A.stride(), lora_A.get_device(), lora_A.data_ptr() % 16,
        lora_B.dtype, lora_B.shape, lora_B.stride(), lora_B.get_device(), lora_B.data_ptr() % 16,
        None if bias is None else (bias.dtype, bias.shape, bias.stride(), bias.get_device(), bias.data_ptr() % 16),
    )  # fmt: skip


def weight_key_of(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Hashable:
    """What determines how an effective weight is computed; None where more does. backend: as requested."""
    if not direct(weight, lora_A, lora_B):
        return None
    if type(scaling) is not float or not here(weight) or counted() or tiles_in_force():
        return None
    return (
        scaling, backend, instrumentation(),
        weight.dtype, weight.shape, weight.stride(), weight.get_device(), weight.data_ptr() % 16,
        lora_A.dtype, lora_A.shape, lora_A.stride(), lora_A.get_device(), lora_A.data_ptr() % 16,
        lora_B.dtype, lora_B.shape, lora_B.stride(), lora_B.get_device(), lora_B.data_ptr() % 16,
    )  # fmt: skip


def call_of(key: Hashable) -> Call | None:
    """How a call with this key was computed, where there is a short way; None elsewhere."""
    return None if key is None else _calls.get(key)


def keeper(
    key: Hashable, fan_in_fan_out: bool, enable_lora: list[bool], rest: tuple[float, float, int, int, str]
) -> Keep:
    """What is to be given the recording of a forward that is differentiated, for calls with its key.

    enable_lora, and rest, scaling and so on: as they were given to `linear_op.lora_linear`.
    """

    def keep(program: Program) -> None:
        known = linear_op.Known(program)

        def again(
            x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None = None
        ) -> Tensor:
            weight = weight.T if fan_in_fan_out else weight
            return linear_op.known_linear(known, x, weight, bias, lora_A, lora_B, enable_lora, seed, *rest)

        _keep(key, again)

    return keep


def remember(
    key: Hashable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    enable_lora: Sequence[bool],
    backend: str,
) -> None:
    """To be called once these were computed without gradients or a mask; weight [N, K]. backend: as requested."""
    if key is None or key in _calls:
        return
    call: Call | None = None
    path = _path(x, weight, lora_A, backend)
    if path == "decode":
        from . import decoding

        call = decoding.again(x, weight, bias, lora_A, lora_B, scaling, enable_lora)
    elif path == "triton":
        from .kernels import own_panel

        call = own_panel.forward_again(x, weight, bias, lora_A, lora_B, scaling, enable_lora)
    _keep(key, call)


def remember_weight(
    key: Hashable, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str
) -> None:
    """To be called once an effective weight was computed of these."""
    if key is None or key in _calls:
        return
    call = None
    if choose(backend, weight.device, weight.dtype, lora_A.dtype).path != "reference":
        from .kernels import low_rank_update

        call = low_rank_update.effective_weight_again(weight, lora_A, lora_B, scaling)
    _keep(key, call)


def _keep(key: Hashable, call: Call | None) -> None:
    _calls[key] = call
    if len(_calls) > _MOST_CALLS:
        _calls.popitem(last=False)


def _path(x: Tensor, weight: Tensor, lora_A: Tensor, backend: str) -> str | None:
    """Which path computed them; None where that alone does not tell how."""
    # A float32 product also depends on a global flag, and rows that are no matrix would be copied first.
    if x.dtype.itemsize != 2 or x.dim() < 2 or x.numel() == 0 or not (x.dim() == 2 or x.is_contiguous()):
        return None
    (N, K), what = weight.shape, (backend, x.device, x.dtype, lora_A.dtype)
    return choose_forward(*what, x.numel() // K, K, N, ranks=len(lora_A), drops=False, trains=False).path
