"""The sixteen bugs of loralib that are not copied: each promise holds here and, where it can be asked, fails there."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from numerics import assert_as_accurate_as
from promises import (
    KINDS,
    PROMISES,
    Allocations,
    Promise,
    adapter,
    build,
    embedding_with_max_norm,
    fill,
    filled,
    inputs,
    look_alikes,
    one_thread,  # noqa: F401 (an autouse fixture)
    output,
    plain,
    promise,
    update_of,
    weight_of,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import fused_lora

# A check takes the package as its argument and uses loralib's interface only.


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
