"""The sixteen bugs of loralib that are not copied: each promise holds here and, where it can be asked, fails there.

A check takes the package as its argument and uses loralib's interface only. The end of the file is what must agree.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from numerics import assert_as_accurate_as
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_lora

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


@promise("01-train-and-eval-return-the-layer", AssertionError, "did not return the layer", KINDS)
def returns_itself(lora: ModuleType, case: str) -> None:
    for layer in (build(lora, case), build(lora, case, merge_weights=False), build(lora, case, r=0)):
        assert layer.eval() is layer, "eval() did not return the layer"
        assert layer.train() is layer and layer.train(False) is layer, "train() did not return the layer"


# loralib makes an adapter for two kernel dimensions, whatever the convolution has.
@promise(
    "02-conv1d-and-conv3d-train-with-any-kernel", RuntimeError, "is invalid for input of size", ["Conv1d", "Conv3d"]
)
def convolves(lora: ModuleType, case: str) -> None:
    layer = getattr(lora, case)(2, 4, 3, r=2, lora_alpha=4, padding=1)
    x = inputs(case)
    fill(layer.parameters())
    y = output(layer, x)
    assert torch.equal(y, plain(layer, weight_of(layer) + update_of(layer), x)) and update_of(layer).any()


@promise(
    "02-conv1d-and-conv3d-merge-with-any-kernel", RuntimeError, "is invalid for input of size", ["Conv1d", "Conv3d"]
)
def merges_a_convolution(lora: ModuleType, case: str) -> None:
    layer = getattr(lora, case)(2, 4, 2, r=2, lora_alpha=4, stride=2)
    fill(layer.parameters())
    base = weight_of(layer).detach().clone()
    layer.eval()
    assert torch.equal(weight_of(layer), base + update_of(layer)) and update_of(layer).any()
    layer.train()
    assert torch.equal(weight_of(layer), base)


@promise("03-a-convolutions-dropout-drops-elements-of-the-adapters-input", AssertionError, "dropped no element")
def drops(lora: ModuleType) -> None:
    layer = lora.Conv2d(1, 1, 1, r=1, lora_alpha=1, lora_dropout=0.5, merge_weights=False, bias=False)
    with torch.no_grad():
        layer.conv.weight.fill_(8)
        layer.lora_A.fill_(1)
        layer.lora_B.fill_(1)
    x = torch.ones(1, 1, 16, 16)
    y, again = output(layer, x), output(layer, x)
    # A base of 8 that nothing drops, and an adapter's 1 that is dropped or doubled.
    assert set(y.unique().tolist()) == {8.0, 10.0}, "it dropped no element of the adapter's input, or others"
    assert not torch.equal(y, again)
    layer.eval()
    assert torch.equal(output(layer, x), torch.full_like(x, 9))


@promise("03-a-convolutions-dropout-of-1-leaves-the-base", AssertionError, "adapter was not dropped")
def drops_everything(lora: ModuleType) -> None:
    layer, x = filled(lora, "Conv2d", lora_dropout=1.0), inputs("Conv2d")
    assert torch.equal(output(layer, x), plain(layer, weight_of(layer), x)), "the adapter was not dropped"


# loralib's own assertion, which has no message.
@promise(
    "03-kernel-size-may-be-a-tuple", AssertionError, "^$", [("Conv1d", (3,)), ("Conv2d", (3, 2)), ("Conv3d", (1, 2, 3))]
)
def takes_a_tuple(lora: ModuleType, case: tuple[str, tuple[int, ...]]) -> None:
    cls, kernel_size = case
    layer = getattr(lora, cls)(2, 4, kernel_size, r=2, lora_alpha=4)
    fill(layer.parameters())
    x = inputs(cls)
    assert layer.conv.kernel_size == kernel_size
    assert torch.equal(output(layer, x), plain(layer, weight_of(layer) + update_of(layer), x))


# loralib 0.1.2 is not asked: only its main branch registers conv.weight a second time, as weight.
@promise("04-a-convolution-saves-to-safetensors", None, cases=["train", "eval"])
def saves_to_safetensors(lora: ModuleType, case: str) -> None:
    layer = filled(lora, "Conv2d")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.train(case == "train")
    with tempfile.TemporaryDirectory() as folder:
        save_file(layer.state_dict(), Path(folder, "layer.safetensors"))
        loaded = load_file(Path(folder, "layer.safetensors"))
    assert loaded.keys() == before.keys()
    assert all(torch.equal(tensor, before[name].cpu()) for name, tensor in loaded.items())


@promise("04-no-parameter-of-a-convolution-has-two-names", None)
def has_one_name_each(lora: ModuleType) -> None:
    layer = filled(lora, "Conv2d")
    state = layer.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state) == 4
    assert len(list(layer.named_parameters(remove_duplicate=False))) == 4


@promise("04-a-rebound-weight-is-the-one-that-is-used", None)
def follows_a_rebound_weight(lora: ModuleType) -> None:
    layer, x = filled(lora, "Conv2d"), inputs("Conv2d")
    assert layer.weight is layer.conv.weight
    layer.conv.weight = nn.Parameter(torch.full_like(layer.conv.weight, 3.0))
    assert layer.weight is layer.conv.weight
    assert torch.equal(output(layer, x), plain(layer, 3.0 + update_of(layer), x))


@promise(
    "05-a-merged-linear-without-adapters-is-plain", AttributeError, "no attribute 'lora_A'", ["default", [False, False]]
)
def is_plain(lora: ModuleType, case: Any) -> None:
    layer = lora.MergedLinear(4, 6, r=2, **({} if case == "default" else {"enable_lora": case}))
    fill(layer.parameters())
    x = inputs("MergedLinear")
    expected = plain(layer, layer.weight, x)
    for mode in (True, False, True):
        layer.train(mode)
        assert torch.equal(output(layer, x), expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight", "bias"]


@promise("05-the-callers-list-may-change", RuntimeError, "groups", ["fewer", "more"])
def keeps_its_own_list(lora: ModuleType, case: str) -> None:
    enable_lora = [True, False]
    layer = lora.MergedLinear(4, 6, r=2, lora_alpha=4, enable_lora=enable_lora)
    fill(layer.parameters())
    x = inputs("MergedLinear")
    expected = plain(layer, layer.weight + update_of(layer), x)
    enable_lora[:] = [False, False] if case == "fewer" else [True, True]
    assert torch.equal(output(layer, x), expected) and list(layer.enable_lora) == [True, False]


@promise("05-the-default-enable-lora-belongs-to-nobody", AssertionError, "another layer's list")
def shares_no_default(lora: ModuleType) -> None:
    one = lora.MergedLinear(4, 6)
    one.enable_lora.append(True)
    try:
        assert list(lora.MergedLinear(4, 6).enable_lora) == [False], "it is another layer's list"
    finally:
        # It is loralib's default for the rest of the process.
        del one.enable_lora[1:]


# Indexing with what stayed on meta writes nothing, silently.
@promise("06-merged-linear-works-after-meta-and-to-empty", AssertionError, "adapter is missing")
def leaves_meta(lora: ModuleType) -> None:
    layer = build(lora, "MergedLinear", device="meta")
    assert layer.lora_ind.device.type == "meta"
    layer.to_empty(device=torch.get_default_device())
    fill(layer.parameters())
    x = inputs("MergedLinear")
    y, base = output(layer, x), layer.weight.detach().clone()
    assert torch.equal(y, plain(layer, base + update_of(layer), x)), "the adapter is missing"
    assert layer.lora_ind.tolist() == [True, True, False, False, True, True]
    layer.eval()
    assert torch.equal(output(layer, x), y)


@promise("06-lora-ind-moves-with-the-weight", AssertionError, "stayed")
def moves_its_index(lora: ModuleType) -> None:
    layer = build(lora, "MergedLinear", device="cpu")
    for device in (torch.get_default_device(), torch.device("meta")):
        layer.to(device)
        assert layer.lora_ind.device == layer.weight.device, f"lora_ind stayed on {layer.lora_ind.device}"


# Python 3.14 makes it a PicklingError.
@promise("07-a-layer-without-dropout-pickles", (AttributeError, pickle.PicklingError), r"lambda", KINDS)
def pickles(lora: ModuleType, case: str) -> None:
    layer, x = filled(lora, case, lora_dropout=0.0) if case != "Embedding" else filled(lora, case), inputs(case)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(output(copied, x), output(layer, x))


@promise("08-saved-in-eval-and-loaded-is-merged-once", AssertionError, "merged twice", KINDS)
def is_merged_once(lora: ModuleType, case: str) -> None:
    source, target, x = filled(lora, case), filled(lora, case), inputs(case)
    expected = plain(source, weight_of(source) + update_of(source), x)
    source.eval()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    target.eval()
    assert torch.equal(output(target, x), expected), "the adapter was merged twice"


@promise("09-loading-into-a-merged-layer-takes-effect", AssertionError, "does not follow", KINDS)
def follows_what_it_loads(lora: ModuleType, case: str) -> None:
    source, target, x = filled(lora, case), filled(lora, case), inputs(case)
    target.eval()
    target.load_state_dict(source.state_dict())
    expected = plain(target, weight_of(source) + update_of(source), x)
    assert torch.equal(output(target, x), expected), "the merged layer does not follow what it loaded"


@promise("09-loading-an-adapter-into-a-merged-layer-takes-effect", AssertionError, "does not follow", KINDS)
def follows_an_adapter(lora: ModuleType, case: str) -> None:
    source, target, x = filled(lora, case), filled(lora, case), inputs(case)
    expected = plain(target, weight_of(target) + update_of(source), x)
    target.eval()
    target.load_state_dict(lora.lora_state_dict(source), strict=False)
    assert torch.equal(output(target, x), expected), "the merged layer does not follow what it loaded"


@promise("09-train-after-loading-into-a-merged-layer-is-clean", AssertionError, "never added", KINDS)
def unmerges_what_it_loaded(lora: ModuleType, case: str) -> None:
    source, target, x = filled(lora, case), filled(lora, case), inputs(case)
    target.eval()
    target.load_state_dict(source.state_dict())
    target.train()
    assert torch.equal(weight_of(target), weight_of(source)), "train() took out what was never added"
    assert torch.equal(output(target, x), plain(target, weight_of(source) + update_of(source), x))


@promise("10-an-adapter-edited-while-merged-leaves-the-base", AssertionError, "base changed", KINDS)
def keeps_the_base_when_edited(lora: ModuleType, case: str) -> None:
    layer, x = filled(lora, case), inputs(case)
    base = weight_of(layer).detach().clone()
    layer.eval()
    fill(adapter(layer))
    layer.train()
    assert torch.equal(weight_of(layer), base), "the base changed"
    assert torch.equal(output(layer, x), plain(layer, base + update_of(layer), x))


CASTS = [(kind, dtype) for kind in KINDS for dtype in (torch.float16, torch.bfloat16, torch.float64)]


@promise("10-a-dtype-changed-while-merged-rounds-the-base-alone", AssertionError, "rounded with the adapter", CASTS)
def casts_the_base(lora: ModuleType, case: tuple[str, torch.dtype]) -> None:
    kind, dtype = case
    layer = build(lora, kind)
    for parameter in [weight_of(layer), *adapter(layer)]:
        nn.init.normal_(parameter)
    base = weight_of(layer).detach().clone()
    layer.eval()
    layer.to(dtype)
    assert layer.merged and weight_of(layer).dtype == dtype
    layer.train()
    assert torch.equal(weight_of(layer), base.to(dtype)), "the base was rounded with the adapter in it"


CYCLES = [(kind, dtype) for kind in KINDS for dtype in (torch.float16, torch.bfloat16)]


@promise("11-merging-and-unmerging-changes-no-bit", AssertionError, "bits changed", CYCLES)
def changes_no_bit(lora: ModuleType, case: tuple[str, torch.dtype]) -> None:
    kind, dtype = case
    layer = build(lora, kind, dtype=dtype)
    for parameter in [weight_of(layer), *adapter(layer)]:
        nn.init.normal_(parameter)
    base = weight_of(layer).detach().clone()
    layer.eval()
    assert not torch.equal(weight_of(layer), base)
    layer.train()
    # As integers: equal numbers of unequal bits, as -0.0 and 0.0, would show.
    changed = (weight_of(layer).detach().view(torch.int16) != base.view(torch.int16)).sum()
    assert changed == 0, f"the bits changed of {changed} elements"


# loralib's embedding is not asked: its in-place addition casts to the base's dtype.
@promise(
    "12-float32-adapters-beside-a-half-base", None, cases=[("Embedding", torch.float16), ("Embedding", torch.bfloat16)]
)
@promise(
    "12-float32-adapters-beside-a-half-base",
    RuntimeError,
    "same dtype|scalar type|should be the same",
    [(kind, dtype) for kind in KINDS if kind != "Embedding" for dtype in (torch.float16, torch.bfloat16)],
)
def mixes_dtypes(lora: ModuleType, case: tuple[str, torch.dtype]) -> None:
    kind, dtype = case
    layer = build(lora, kind, dtype=dtype)
    for parameter in adapter(layer):
        parameter.data = parameter.data.float()
    fill(layer.parameters())
    x, update = inputs(kind, dtype), update_of(layer)
    y = layer(x)
    expected = plain(layer, weight_of(layer) + update.to(dtype), x)
    assert y.dtype == dtype and torch.equal(y, expected)
    y.sum().backward()
    assert [p.grad.dtype for p in adapter(layer)] == [torch.float32, torch.float32]
    layer.eval()
    assert weight_of(layer).dtype == dtype and torch.equal(output(layer, x), expected)


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


@promise("13-max-norm-is-the-bases-not-the-adapters", AssertionError, "lora_A was renormalised")
def leaves_the_adapters_norm(lora: ModuleType) -> None:
    layer, x, renormalised = embedding_with_max_norm(lora)
    lora_A = layer.lora_A.detach().clone()
    layer(x)
    assert torch.equal(layer.lora_A, lora_A), "lora_A was renormalised"
    assert torch.equal(layer.weight, renormalised)


@promise("13-max-norm-means-the-same-in-train-and-eval", AssertionError, "is off by", ["train", "eval"])
def renormalises_alike(lora: ModuleType, case: str) -> None:
    layer, x, renormalised = embedding_with_max_norm(lora)
    update = update_of(layer)
    layer.train(case == "train")
    exact = F.embedding(x, renormalised.double() + update.double())
    assert_as_accurate_as(output(layer, x), F.embedding(x, renormalised + update), exact, case)


def embedding_gradients(lora: ModuleType, **options: Any) -> None:
    """Checks them for tokens that repeat and one that is padding."""
    layer, x = filled(lora, "Embedding", padding_idx=1, **options), inputs("Embedding")
    dy = torch.empty(*x.shape, 6)
    fill([dy])
    layer(x).backward(dy)
    by_token, counts = torch.zeros(7, 6), torch.zeros(7)
    for token, gradient in zip(x.flatten().tolist(), dy.flatten(0, 1), strict=True):
        counts[token] += 1
        by_token[token] += gradient
    expected_A = layer.scaling * (by_token @ layer.lora_B.detach()).T
    expected_A[:, 1] = 0
    assert torch.equal(layer.lora_A.grad, expected_A)
    assert torch.equal(layer.lora_B.grad, layer.scaling * (layer.lora_A.detach() @ by_token).T)
    assert layer.weight.grad is None and counts.max() == 3


@promise("13-sparse-embeddings-have-a-backward", RuntimeError, "parse")
def has_a_sparse_backward(lora: ModuleType) -> None:
    embedding_gradients(lora, sparse=True)


# loralib is not asked: its dense (num_embeddings, r) gradient is a cost, and lora_A.grad itself is dense and as large.
@promise("13-the-gradient-of-lora-a-is-right", None)
def has_the_right_gradient(lora: ModuleType) -> None:
    embedding_gradients(lora)


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


LAYOUTS = [(False, 0.0), (True, 0.0), (False, 0.5)]


@promise("14-merged-linear-makes-nothing-of-the-weights-size", AssertionError, "made a tensor", LAYOUTS)
def makes_no_large_tensor(lora: ModuleType, case: tuple[bool, float]) -> None:
    fan_in_fan_out, dropout = case
    options = {"enable_lora": [True, False, True], "fan_in_fan_out": fan_in_fan_out, "lora_dropout": dropout}
    layer = lora.MergedLinear(64, 96, r=2, **options)
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(3, 64, requires_grad=True)
    with Allocations(layer.weight) as seen:
        layer(x).sum().backward()
    assert layer.lora_B.grad.any() and x.grad.any()
    # What it must make: y at the least.
    assert seen.largest >= 3 * 96
    assert seen.largest < 96 * 64, f"{seen.operation} made a tensor of {seen.largest} elements"


def look_alikes(lora: ModuleType) -> nn.Module:
    net = nn.ModuleDict({"explora_tion": nn.Linear(2, 2), "layer": lora.Linear(2, 2, r=1)})
    net["relative_attention_bias"] = nn.Embedding(4, 2)
    return net


@promise("15-names-that-look-alike-are-frozen", AssertionError, "trainable", ["none", "all", "lora_only"])
def freezes_look_alikes(lora: ModuleType, case: str) -> None:
    net = look_alikes(lora)
    lora.mark_only_lora_as_trainable(net, case)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    biases = {"none": set(), "all": {"explora_tion.bias", "layer.bias"}, "lora_only": {"layer.bias"}}[case]
    assert trainable == {"layer.lora_A", "layer.lora_B"} | biases, f"{trainable} are trainable"


@promise("15-names-that-look-alike-are-not-saved", AssertionError, "saved", ["none", "all", "lora_only"])
def saves_no_look_alikes(lora: ModuleType, case: str) -> None:
    saved = set(lora.lora_state_dict(look_alikes(lora), case))
    biases = {"none": set(), "all": {"explora_tion.bias", "layer.bias"}, "lora_only": {"layer.bias"}}[case]
    assert saved == {"layer.lora_A", "layer.lora_B"} | biases, f"{saved} were saved"


@promise("15-a-lora-layer-with-such-a-name-keeps-its-bias", AssertionError, "saved")
def saves_its_bias(lora: ModuleType) -> None:
    net = nn.ModuleDict({"explora_tion": lora.Linear(2, 2, r=1)})
    saved = set(lora.lora_state_dict(net, "lora_only"))
    assert saved == {f"explora_tion.{name}" for name in ("lora_A", "lora_B", "bias")}, f"{saved} were saved"


@promise("16-a-saved-adapter-brings-its-scaling", AssertionError, "scaling was lost", ["train", "eval"])
def brings_its_scaling(lora: ModuleType, case: str) -> None:
    source, target, x = filled(lora, "Linear", lora_alpha=4), filled(lora, "Linear", lora_alpha=16), inputs("Linear")
    target.train(case == "train")
    update = update_of(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter")
        if lora is loralib:
            # All that it has.
            torch.save(lora.lora_state_dict(source), path)
            target.load_state_dict(torch.load(path), strict=False)
        else:
            lora.save_adapter(source, path)
            lora.load_adapter(target, path)
    y = output(target, x)
    target.train()
    assert torch.equal(y, plain(target, weight_of(target) + update, x)), "the scaling was lost"
    assert (target.lora_alpha, target.scaling) == (4, 2.0)


@promise("16-an-adapters-file-tells-r-and-lora-alpha", AttributeError, "'save_adapter'")
def tells_r_and_alpha(lora: ModuleType) -> None:
    net = nn.Sequential(
        build(lora, "Linear", lora_alpha=3, lora_dropout=0.25), nn.Linear(6, 4), build(lora, "Conv2d", r=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        lora.save_adapter(net, path)
        configs = lora.adapter_configs(path)
        tensors = load_file(path)
    assert {name: (c.r, c.lora_alpha, c.lora_dropout) for name, c in configs.items()} == {
        "0": (2, 3, 0.25),
        "2": (1, 4, 0),
    }
    assert tensors.keys() == lora.lora_state_dict(net).keys()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What is as small as this has nothing for a second thread but waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """What names no device is made on `device`."""
    with torch.device(device):
        yield


@pytest.mark.parametrize("promised", PROMISES, ids=lambda promised: promised.name)
def test_fused_lora_keeps_the_promise(promised: Promise, on_device: None) -> None:
    promised.check(fused_lora)


@pytest.mark.parametrize("promised", [p for p in PROMISES if p.raises], ids=lambda promised: promised.name)
def test_loralib_breaks_the_promise(promised: Promise) -> None:
    with pytest.raises(promised.raises, match=promised.match):
        promised.check(loralib)


def test_neither_path_of_merged_linear_makes_anything_of_the_weights_size(backend: str, on_device: None) -> None:
    for layout in LAYOUTS:
        makes_no_large_tensor(fused_lora, layout)


def test_every_one_of_the_sixteen_bugs_is_checked() -> None:
    assert {int(promised.name[:2]) for promised in PROMISES} == set(range(1, 17))
    assert {p.name[:2] for p in PROMISES if p.raises is None} - {p.name[:2] for p in PROMISES if p.raises} == {"04"}


# What must agree. Both packages are asked, so that what is asserted is known to be loralib's interface.
both = pytest.mark.parametrize("lora", [loralib, fused_lora], ids=["loralib", "fused_lora"])
every_kind = pytest.mark.parametrize("kind", KINDS)
LAYERS = ["Linear", "MergedLinear", "Embedding", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d", "LoRALayer"]
FUNCTIONS = ["mark_only_lora_as_trainable", "lora_state_dict"]


@both
def test_exported_names(lora: ModuleType) -> None:
    assert lora.name == "lora"
    for module, names in (("layers", LAYERS), ("utils", FUNCTIONS)):
        submodule = importlib.import_module(f"{lora.__name__}.{module}")
        assert getattr(lora, module) is submodule
        namespace: dict[str, Any] = {}
        exec(f"from {lora.__name__} import *", namespace)
        for name in names:
            assert getattr(lora, name) is getattr(submodule, name) is namespace[name], name


@both
def test_class_tree(lora: ModuleType) -> None:
    assert issubclass(lora.Linear, nn.Linear) and issubclass(lora.MergedLinear, nn.Linear)
    assert issubclass(lora.Embedding, nn.Embedding) and issubclass(lora.ConvLoRA, nn.Module)
    assert all(issubclass(cls, lora.ConvLoRA) for cls in (lora.Conv1d, lora.Conv2d, lora.Conv3d))
    assert all(issubclass(getattr(lora, name), lora.LoRALayer) for name in LAYERS)
    assert not issubclass(lora.LoRALayer, nn.Module) and not issubclass(lora.MergedLinear, lora.Linear)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "ConvLoRA", "LoRALayer", *FUNCTIONS])
def test_loralibs_arguments_keep_their_places_names_and_defaults(name: str) -> None:
    def arguments(lora: ModuleType) -> list[tuple[str, Any]]:
        parameters = inspect.signature(getattr(lora, name)).parameters.values()
        # enable_lora's default is a list there and a tuple here.
        return [
            (p.name, list(p.default) if p.name == "enable_lora" else p.default)
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    assert arguments(fused_lora) == arguments(loralib)


@both
@every_kind
def test_attributes(lora: ModuleType, kind: str, on_device: None) -> None:
    layer = build(lora, kind, merge_weights=False)
    assert (layer.r, layer.lora_alpha, layer.scaling) == (2, 4, 2.0)
    assert layer.merged is False and layer.merge_weights is False
    x = inputs(kind)
    assert layer.lora_dropout(x) is x
    if kind != "Embedding":
        dropout = build(lora, kind, lora_dropout=0.25).lora_dropout
        assert isinstance(dropout, nn.Dropout) and dropout.p == 0.25
    if "Linear" in kind:
        assert layer.fan_in_fan_out is kind.endswith("transposed")
    if kind.startswith("MergedLinear"):
        assert list(layer.enable_lora) == SIZES[kind][2]["enable_lora"]
        assert layer.lora_ind.dtype == torch.bool and layer.lora_ind.shape == (6,) and not list(layer.buffers())
        # The outputs that an adapter reaches, whatever its values.
        for parameter in adapter(layer):
            nn.init.ones_(parameter)
        update = update_of(layer)
        assert torch.equal((update.T if layer.fan_in_fan_out else update).any(1), layer.lora_ind)
    if kind.startswith("Conv"):
        assert isinstance(layer.conv, getattr(nn, kind[:6]))


SHAPES = {
    "Linear": ((6, 4), (2, 4), (6, 2)),
    "Linear-transposed": ((4, 6), (2, 4), (6, 2)),
    "MergedLinear": ((6, 4), (4, 4), (4, 2)),
    "MergedLinear-transposed": ((4, 6), (2, 4), (3, 2)),
    "Embedding": ((7, 6), (2, 7), (6, 2)),
    "Conv1d": ((4, 2, 1), (2, 2), (4, 2)),
    "Conv2d": ((4, 2, 3, 3), (6, 6), (12, 6)),
    "Conv2d-groups": ((4, 1, 3, 3), (6, 6), (6, 6)),
    "Conv3d": ((4, 2, 1, 1, 1), (2, 2), (4, 2)),
}


@both
@every_kind
def test_shapes_keys_their_order_and_freezing(lora: ModuleType, kind: str, on_device: None) -> None:
    layer = build(lora, kind)
    keys = ["weight", "bias", "lora_A", "lora_B"]
    if kind == "Embedding":
        keys.remove("bias")
    if kind.startswith("Conv"):
        keys = ["lora_A", "lora_B", "conv.weight", "conv.bias"]
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == keys
    assert (weight_of(layer).shape, layer.lora_A.shape, layer.lora_B.shape) == SHAPES[kind]
    assert weight_of(layer).is_contiguous() is not kind.endswith("transposed")
    frozen = [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    assert frozen == [key for key in keys if key.endswith("weight")]


@both
@every_kind
@pytest.mark.parametrize("merge_weights", [True, False])
def test_eval_merges_and_train_unmerges_unless_told_not_to(
    merge_weights: bool, lora: ModuleType, kind: str, on_device: None
) -> None:
    layer, x = filled(lora, kind, merge_weights=merge_weights), inputs(kind)
    base, update = weight_of(layer).detach().clone(), update_of(layer)
    assert update.any()
    for mode in (True, False, False, True, True, False):
        layer.train(mode)
        assert layer.merged is (merge_weights and not mode)
        assert torch.equal(weight_of(layer), base + update if layer.merged else base)
        assert torch.equal(output(layer, x), plain(layer, base + update, x))


INITIAL = {
    "Linear": ("Linear", (11, 7), {}),
    "Linear-transposed": ("Linear", (11, 7), {"fan_in_fan_out": True}),
    "Linear-no-bias": ("Linear", (11, 7), {"bias": False}),
    **{
        f"MergedLinear-{enable_lora}-{transposed}": (
            "MergedLinear",
            (11, 6),
            {"enable_lora": enable_lora, "fan_in_fan_out": transposed},
        )
        for enable_lora in ([True], [True, False, True], [False, True], [True, True, True])
        for transposed in (False, True)
    },
    "Embedding": ("Embedding", (13, 5), {}),
    "Embedding-padded": ("Embedding", (13, 5), {"padding_idx": 3}),
    "Conv2d": ("Conv2d", (4, 6, 3), {}),
    "Conv2d-groups": ("Conv2d", (4, 6, 3), {"groups": 2}),
    "Conv2d-no-bias": ("Conv2d", (4, 6, 1), {"bias": False}),
}


@pytest.mark.parametrize("r", [0, 1, 3])
@pytest.mark.parametrize("name", INITIAL)
def test_the_same_seed_draws_loralibs_values(name: str, r: int, on_device: None) -> None:
    cls, sizes, options = INITIAL[name]
    drawn = []
    for lora in (fused_lora, loralib):
        torch.manual_seed(7)
        # Two, and what comes after them: a draw too few or too many shows in the next.
        layers = [getattr(lora, cls)(*sizes, r=r, **options) for _ in range(2)]
        drawn.append([*nn.ModuleList(layers).state_dict().items(), ("next", torch.rand(3))])
    for (key, mine), (other_key, other) in zip(*drawn, strict=True):
        assert key == other_key and mine.stride() == other.stride() and torch.equal(mine, other), key


@both
@every_kind
def test_rank_0_has_no_adapter_but_still_says_merged(lora: ModuleType, kind: str, on_device: None) -> None:
    layer, x = filled(lora, kind, r=0), inputs(kind)
    assert not any(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling"))
    assert all(parameter.requires_grad for parameter in layer.parameters())
    base = weight_of(layer).detach().clone()
    for mode in (False, True):
        layer.train(mode)
        assert layer.merged is not mode
        assert torch.equal(weight_of(layer), base) and torch.equal(output(layer, x), plain(layer, base, x))
    layer.merge_weights = False
    layer.eval()
    assert layer.merged is False


@both
def test_an_unknown_bias_is_not_implemented(lora: ModuleType) -> None:
    for name in FUNCTIONS:
        with pytest.raises(NotImplementedError):
            getattr(lora, name)(nn.Sequential(build(lora, "Linear")), "some")
