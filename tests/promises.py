"""Layers of every kind, what they must compute, and the registry of promises that loralib's bugs break."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "Linear": ("Linear", (4, 6), {}),
    "Linear-transposed": ("Linear", (4, 6), {"fan_in_fan_out": True}),
    "MergedLinear": ("MergedLinear", (4, 6), {"enable_lora": [True, False, True]}),
    "MergedLinear-transposed": ("MergedLinear", (4, 6), {"enable_lora": [False, True], "fan_in_fan_out": True}),
    "Embedding": ("Embedding", (7, 6), {}),
    # loralib's Conv1d and Conv3d work for kernel_size 1 only; see 02.
    "Conv1d": ("Conv1d", (2, 4, 1), {}),
    "Conv2d": ("Conv2d", (2, 4, 3), {}),
    "Conv2d-groups": ("Conv2d", (2, 4, 3), {"groups": 2}),
    "Conv3d": ("Conv3d", (2, 4, 1), {}),
}
KINDS = list(SIZES)


def build(lora: ModuleType, kind: str, *, r: int = 2, lora_alpha: float = 4, **options: Any) -> nn.Module:
    cls, sizes, more = SIZES[kind]
    return getattr(lora, cls)(*sizes, r=r, lora_alpha=lora_alpha, **copy.deepcopy(more), **options)


def fill(tensors: Any) -> None:
    """Draws -1, 0 or 1 for every element. Sums of these are exact in every dtype and order, so that results are equal,
    not close: the longest, a Conv2d's, has 18 terms of at most 1 + 2 * 6, less than the 256 that bfloat16 counts to."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randint(-1, 2, tensor.shape))


def filled(lora: ModuleType, kind: str, **options: Any) -> nn.Module:
    layer = build(lora, kind, **options)
    fill(layer.parameters())
    return layer


def adapter(layer: nn.Module) -> list[nn.Parameter]:
    return [layer.lora_A, layer.lora_B]


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "Embedding":
        return torch.tensor([[0, 6, 3], [3, 3, 1]])
    dimensions = {"Conv1d": 1, "Conv2d": 2, "Conv2d-groups": 2, "Conv3d": 3}.get(kind)
    x = torch.empty((3, 4) if dimensions is None else (2, 2, *[5] * dimensions), dtype=dtype)
    fill([x])
    return x


def weight_of(layer: nn.Module) -> Tensor:
    return (layer.conv if hasattr(layer, "conv") else layer).weight


def update_of(layer: nn.Module) -> Tensor:
    """scaling * B A as loralib documents it for each class, laid out as the weight is."""
    lora_A, lora_B = (t.detach() for t in adapter(layer))
    if hasattr(layer, "conv"):
        return layer.scaling * (lora_B @ lora_A).view(layer.conv.weight.shape)
    if isinstance(layer, nn.Embedding):
        return layer.scaling * (lora_B @ lora_A).T
    update = lora_B.new_zeros(layer.out_features, layer.in_features)
    slices = getattr(layer, "enable_lora", [True])
    rows = layer.out_features // len(slices)
    for nth, s in enumerate(s for s, enabled in enumerate(slices) if enabled):
        lora_A_n, lora_B_n = lora_A[nth * layer.r : (nth + 1) * layer.r], lora_B[nth * rows : (nth + 1) * rows]
        update[s * rows : (s + 1) * rows] = layer.scaling * (lora_B_n @ lora_A_n)
    return update.T if layer.fan_in_fan_out else update


def plain(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What torch's own layer of this kind computes with the weight."""
    weight = weight.detach()
    if hasattr(layer, "conv"):
        return torch.func.functional_call(layer.conv, {"weight": weight}, (x,)).detach()
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    return F.linear(x, weight.T if layer.fan_in_fan_out else weight, layer.bias).detach()


@torch.no_grad()
def output(layer: nn.Module, x: Tensor) -> Tensor:
    """Without gradients, so that a merged layer does not warn."""
    return layer(x)


Errors = type[BaseException] | tuple[type[BaseException], ...]


@dataclass(frozen=True)
class Promise:
    name: str
    check: Callable[[ModuleType], None]
    # What loralib 0.1.2 raises instead, and words of the message; None where it cannot be asked.
    raises: Errors | None
    match: str


PROMISES: list[Promise] = []


def promise(name: str, raises: Errors | None, match: str = "", cases: list[Any] | None = None) -> Callable[..., Any]:
    """Registers check(lora), or check(lora, case) once for each case."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        for case in [None] if cases is None else cases:
            one = check if case is None else partial(check, case=case)
            words = [] if case is None else case if isinstance(case, tuple) else [case]
            PROMISES.append(Promise("-".join([name, *map(str, words)]).replace("torch.", ""), one, raises, match))
        return check

    return register


def embedding_with_max_norm(lora: ModuleType) -> tuple[nn.Module, Tensor, Tensor]:
    """An embedding whose rows are longer than max_norm, as are lora_A's; tokens; its weight after a look-up of them."""
    layer = build(lora, "Embedding", max_norm=0.5)
    fill(adapter(layer))
    with torch.no_grad():
        layer.lora_A.add_(4)
    x = inputs("Embedding")
    renormalised = nn.Embedding(7, 6, max_norm=0.5, _weight=layer.weight.detach().clone())
    output(renormalised, x)
    assert not torch.equal(renormalised.weight, layer.weight)
    return layer, x, renormalised.weight.detach()


class Allocations(TorchDispatchMode):
    """The elements of the largest storage that any operation returns, except the given one."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.largest, self.operation = known, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_lora":
            # Into the op's implementation, which would run unseen otherwise.
            with self:
                key = getattr(torch._C.DispatchKey, self.known.device.type.upper())
                result = func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.known.data_ptr():
                elements = tensor.untyped_storage().nbytes() // self.known.element_size()
                if elements > self.largest:
                    self.largest, self.operation = elements, str(func)
        return result


def look_alikes(lora: ModuleType) -> nn.Module:
    net = nn.ModuleDict({"explora_tion": nn.Linear(2, 2), "layer": lora.Linear(2, 2, r=1)})
    net["relative_attention_bias"] = nn.Embedding(4, 2)
    return net


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What is as small as this has nothing for a second thread but waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
