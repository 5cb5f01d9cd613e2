"""Embedding against loralib 0.1.2 and nn.Embedding."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import loralib
import pytest
import torch
from lookups import (
    DOUBLE,
    DTYPES,
    HALF,
    SINGLE,
    assert_matches_float64,
    dtype_id,
    expression,
    fused,
    make_lookup,
    outputs_and_gradients,
    trained,
)
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora import Embedding


def sum_exactly(layer: Embedding) -> None:
    """In the interpreter, rounds the adapter to eighths, of which float32 holds every sum of products.

    There numpy sums a row in an order that depends on where it lies in a tile, which a GPU does not.
    """
    for parameter in (layer.lora_A, layer.lora_B):
        if not parameter.is_cuda:
            parameter.data = (parameter.data * 8).round() / 8


def build(cls: type[nn.Embedding], options: dict[str, Any]) -> nn.Embedding:
    torch.manual_seed(3)
    layer = cls(7, 5, **options)
    if options["r"] > 0:
        assert not layer.lora_A.any() and layer.lora_B.any()
        torch.manual_seed(4)
        nn.init.normal_(layer.lora_A)
    return layer


def step(layer: nn.Embedding, mode: bool, indices: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one call in the given mode, with a dy that is the same for every layer."""
    layer.train(mode)
    layer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(indices)
    if y.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(HALF)
        y.backward(dy.to(y.dtype))
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients}


def assert_steps_as_loralib(ours: nn.Embedding, theirs: nn.Embedding, indices: Tensor) -> None:
    oracle = copy.deepcopy(theirs).double()
    for mode in (True, False, False, True):
        mine, other, exact = (step(layer, mode, indices) for layer in (ours, theirs, oracle))
        assert ours.merged == theirs.merged, f"merged after train({mode})"
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert_as_accurate_as(value, other[name], exact[name], f"{name} after train({mode})")


OPTIONS = [
    {"r": r, "lora_alpha": 6, "padding_idx": padding, "scale_grad_by_freq": by_frequency, "merge_weights": merge}
    for r, padding, by_frequency, merge in product([0, 1, 4], [None, 2, -1], [False, True], [False, True])
]
# 2 and 6 are padding indices; both occur more than once, and so does 1.
INDICES = torch.tensor([[2, 0, 2, 1], [6, 6, 4, 1]])
CASES = [(options, INDICES) for options in OPTIONS] + [
    (OPTIONS[-1], indices) for indices in (torch.tensor(6), INDICES[0], INDICES[:, :3], torch.empty(0).long())
]


def case_id(value: Any) -> str:
    return "-".join(f"{name}={v}" for name, v in value.items()) if isinstance(value, dict) else str(tuple(value.shape))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=dtype_id)
@pytest.mark.parametrize(("options", "indices"), CASES, ids=case_id)
def test_same_seed_same_init_outputs_and_gradients_as_loralib(
    options: dict[str, Any], indices: Tensor, dtype: torch.dtype
) -> None:
    ours, theirs = (build(cls, {**options, "dtype": dtype}) for cls in (Embedding, loralib.Embedding))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride(), name
        assert mine.requires_grad == other.requires_grad, name
    for attribute in ("r", "lora_alpha", "merged", "merge_weights", "padding_idx", "scale_grad_by_freq"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert hasattr(ours, "scaling") == hasattr(theirs, "scaling") == (options["r"] > 0)
    assert_steps_as_loralib(ours, theirs, indices)


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_a_trained_base_weight_gets_loralibs_gradient_in_either_mode(
    padding_idx: int | None, scale_grad_by_freq: bool
) -> None:
    options = {"r": 2, "padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    layers = [build(cls, options) for cls in (Embedding, loralib.Embedding)]
    for layer in layers:
        layer.weight.requires_grad = True
    assert_steps_as_loralib(*layers, INDICES)


def test_attributes_and_class_tree() -> None:
    layer = Embedding(6, 3, 2, 8, False, padding_idx=1)
    assert isinstance(layer, nn.Embedding) and isinstance(layer, fused_lora.LoRALayer)
    assert layer.scaling == 4.0 and layer.merge_weights is False and layer.padding_idx == 1
    assert layer.lora_A.shape == (2, 6) and layer.lora_B.shape == (3, 2) and not layer.weight.requires_grad
    assert "r=2" in repr(layer) and "lora_alpha=8" in repr(layer) and "padding_idx=1" in repr(layer)
    assert not layer.weight[1].any(), "nn.Embedding zeroes the padding row"
    assert layer.eval() is layer and layer.train() is layer


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_any_shape_and_either_integer_dtype(backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype):
    lookup = make_lookup(math.prod(shape), 7, 5, 2, dtype=SINGLE, device=device)
    lookup.indices, lookup.dy = lookup.indices.view(shape).to(dtype), lookup.dy.view(*shape, 5)
    assert_matches_float64(lookup)


@pytest.mark.parametrize(
    "view", [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1], lambda x: x[:1].expand(4, -1)], ids=range(4)
)
def test_indices_of_any_strides(backend: str, device: str, view: Callable[[Tensor], Tensor]) -> None:
    lookup = make_lookup(12, 7, 5, 2, dtype=SINGLE, device=device)
    strided = view(torch.arange(12, device=device).view(3, 4) % 7)
    y = fused(strided, *lookup.factors())
    assert torch.equal(y, fused(strided.contiguous(), *lookup.factors()))
    gradients = [
        torch.autograd.grad(fused(x, *lookup.factors()).square().sum(), lookup.factors())
        for x in (strided, strided.contiguous())
    ]
    for name, mine, other in zip(lookup.NAMES, *gradients, strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("index", [-1, -8, 7, 2**31 - 1])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device's assertion would end the process's CUDA context")
def test_an_index_out_of_range_raises(backend: str, index: int, dtype: torch.dtype) -> None:
    lookup = make_lookup(3, 7, 5, 2, dtype=SINGLE, device="cpu")
    # The interpreter has no error of its own for an assertion of the device's.
    expected = IndexError if backend == "reference" else Exception
    for position in range(3):
        indices = lookup.indices.to(dtype)
        indices[position] = index
        with pytest.raises(expected, match="out of"):
            fused(indices, *lookup.factors())


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device's assertion would end the process's CUDA context")
def test_an_index_out_of_range_is_an_index_error_of_the_layer(mode: bool, r: int) -> None:
    layer = Embedding(7, 5, r=r).train(mode).requires_grad_(False)
    for index in (-1, 7):
        with pytest.raises(IndexError, match="out of"):
            layer(torch.tensor([0, index]))


@pytest.mark.parametrize("padding_idx", [0, 3, 6, -1, -7])
def test_padding_gives_its_row_and_column_no_gradient(backend: str, device: str, padding_idx: int) -> None:
    indices = torch.arange(7, device=device).repeat(3)
    lookup = make_lookup(21, 7, 5, 2, dtype=SINGLE, device=device)
    lookup.indices = indices
    results = outputs_and_gradients(lookup, fused, padding_idx=padding_idx)
    for gradient in (results["dweight"], results["dlora_A"].T):
        assert (gradient != 0).any(1).tolist() == [row != padding_idx % 7 for row in range(7)]
    # Its output is an output like any other, and so lora_B learns from it.
    unpadded = outputs_and_gradients(lookup.to(), fused)
    assert torch.equal(results["y"], unpadded["y"]) and torch.equal(results["dlora_B"], unpadded["dlora_B"])
    assert (unpadded["dlora_A"] != 0).all(), "without padding_idx every index learns, the last one too"


@pytest.mark.parametrize("mode", [True, False])
def test_a_trained_layers_padding_row_gets_no_gradient_in_either_mode(mode: bool) -> None:
    layer = trained(7, 5, r=2, padding_idx=3)
    layer.weight.requires_grad = True
    layer.train(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(torch.arange(7)).sum().backward()
    assert not layer.weight.grad[3].any() and layer.weight.grad[2].all()


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradients_scaled_by_frequency_are_nn_embeddings(device: str, padding_idx: int | None) -> None:
    indices = torch.tensor([[1, 1, 1, 5], [2, 2, 5, 0]], device=device)
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": True}
    layer = trained(7, 5, r=2, lora_alpha=3, dtype=DOUBLE, device=device, **options)
    layer.weight.requires_grad = True
    plain = nn.Embedding(7, 5, dtype=DOUBLE, device=device, **options)
    leaf = layer.lora_A.detach().clone().requires_grad_()
    dy = torch.randn(2, 4, 5, dtype=DOUBLE, device=device)
    layer(indices).backward(dy)
    plain(indices).backward(dy)
    update = F.embedding(indices, leaf.T, padding_idx, scale_grad_by_freq=True) @ layer.lora_B.detach().T
    (update * layer.scaling).backward(dy)
    # The same op of torch's on the same numbers.
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    # Products and sums of a few float64 numbers of unit scale, in two orders.
    torch.testing.assert_close(layer.lora_A.grad, leaf.grad, rtol=1e-13, atol=1e-13)
    # The mean over a token's three occurrences instead of their sum.
    torch.testing.assert_close(layer.weight.grad[1], dy[0, :3].mean(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_sparse_gradient_of_the_weight_is_nn_embeddings(backend: str, device: str, padding_idx: int | None) -> None:
    indices = torch.tensor([[1, 1, 6], [2, 0, 2]], device=device)
    options = {"padding_idx": padding_idx, "sparse": True, "device": device}
    layer, plain = trained(7, 5, r=2, **options), nn.Embedding(7, 5, **options)
    layer.weight.requires_grad = True
    dense = copy.deepcopy(layer)
    dense.sparse = False
    dy = torch.randn(2, 3, 5, device=device)
    for module in (layer, plain, dense):
        module(indices).backward(dy)
    mine, other = layer.weight.grad, plain.weight.grad
    assert mine.is_sparse and torch.equal(mine._indices(), other._indices())
    assert torch.equal(mine._values(), other._values()) and mine.shape == other.shape
    assert not dense.weight.grad.is_sparse and not layer.lora_A.grad.is_sparse and not layer.lora_B.grad.is_sparse
    assert torch.equal(layer.lora_A.grad, dense.lora_A.grad) and torch.equal(layer.lora_B.grad, dense.lora_B.grad)


def test_a_frozen_weight_with_sparse_gradients_trains_the_adapter_all_the_same() -> None:
    # loralib raises here, in backward.
    layer = trained(7, 5, r=2, sparse=True)
    layer(torch.tensor([1, 1, 3])).sum().backward()
    assert layer.weight.grad is None and layer.lora_A.grad[:, [1, 3]].all()


def normed(norm_type: float, device: str, **options: Any) -> Embedding:
    """A layer whose every row exceeds max_norm, the adapter's too, with rows of some spread."""
    layer = Embedding(7, 5, r=2, lora_alpha=3, max_norm=0.5, norm_type=norm_type, device=device, **options)
    with torch.no_grad():
        layer.lora_A.normal_().add_(2)
        layer.weight.add_(1)
    return layer


NORM_TYPES = [1, 2.0, math.inf]


@pytest.mark.parametrize(
    "indices", [torch.tensor([[1, 4, 1], [6, 6, 1]]), torch.arange(8).view(4, 2)[:3, ::2]], ids=range(2)
)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_max_norm_renormalises_what_nn_embedding_would_and_never_the_adapter(
    device: str, norm_type: float, dtype: torch.dtype, indices: Tensor
) -> None:
    layer, indices = normed(norm_type, device, dtype=dtype), indices.to(device)
    plain = nn.Embedding(7, 5, max_norm=0.5, norm_type=norm_type, device=device, dtype=dtype)
    plain.load_state_dict({"weight": layer.weight})
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    for _ in range(2):
        y, base = layer(indices), plain(indices)
        assert torch.equal(layer.weight, plain.weight)
        assert torch.equal(layer.lora_A, before["lora_A"]) and torch.equal(layer.lora_B, before["lora_B"])
        changed = (layer.weight != before["weight"]).any(1).nonzero().flatten()
        assert changed.tolist() == indices.unique().tolist()
        A, B, double = layer.lora_A, layer.lora_B, base.double()
        exact = double + F.embedding(indices, A.double().T) @ B.double().T * layer.scaling
        assert_as_accurate_as(y, base + F.embedding(indices, A.T) @ B.T * layer.scaling, exact, "y")


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=dtype_id)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_with_max_norm_merged_lookups_equal_unmerged_ones(
    backend: str, device: str, norm_type: float, dtype: torch.dtype
) -> None:
    layer = normed(norm_type, device, dtype=dtype).requires_grad_(False)
    sum_exactly(layer)
    indices = torch.tensor([[1, 4, 1], [6, 6, 0]], device=device)
    merged = copy.deepcopy(layer).eval()(indices)
    # Before layer's own rows are renormalised, which is then done in float64.
    exact = lookups_in_float64(copy.deepcopy(layer).double(), indices)
    unmerged = layer(indices)
    if backend == "triton":
        # One kernel does both.
        assert torch.equal(merged, unmerged)
    assert_as_accurate_as(merged, unmerged, exact, "merged")


def lookups_in_float64(layer: Embedding, indices: Tensor) -> Tensor:
    """The plain expression over a float64 layer, renormalised as nn.Embedding would."""
    base = layer.weight.detach().clone()
    if layer.max_norm is not None:
        torch.embedding_renorm_(base, indices.contiguous(), layer.max_norm, layer.norm_type)
    return expression(indices, base, layer.lora_A.detach(), layer.lora_B.detach(), scaling=layer.scaling)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_max_norm_changes_nothing_while_merged_and_unmerging_restores_every_bit(device: str, norm_type: float) -> None:
    layer = normed(norm_type, device).requires_grad_(False)
    layer(torch.tensor([2], device=device))
    before = layer.weight.clone()
    merged = layer.eval().weight.clone()
    layer(torch.arange(7, device=device))
    assert torch.equal(layer.weight, merged) and torch.equal(layer.base_weight, before)
    assert torch.equal(layer.state_dict()["weight"], before)
    assert torch.equal(layer.train().weight, before)


def test_without_an_adapter_max_norm_is_nn_embeddings_in_either_mode(device: str) -> None:
    layer = Embedding(7, 5, max_norm=0.5, device=device)
    plain = nn.Embedding(7, 5, max_norm=0.5, device=device)
    plain.load_state_dict(layer.state_dict())
    for mode, indices in ((True, [1, 4]), (False, [2, 4]), (True, [0])):
        tensor = torch.tensor(indices, device=device)
        assert torch.equal(layer.train(mode)(tensor), plain(tensor)) and torch.equal(layer.weight, plain.weight)


def test_with_max_norm_several_forwards_before_a_backward_are_fine_as_in_nn_embedding(device: str) -> None:
    layer = normed(2.0, device)
    layer.weight.requires_grad = True
    first, second = (layer(torch.tensor(x, device=device)) for x in ([1, 2], [2, 3]))
    (first.sum() + second.sum()).backward()
    expected = torch.tensor([0.0, 1, 2, 1, 0, 0, 0], device=device)
    assert torch.equal(layer.weight.grad, expected[:, None].expand(7, 5))


@pytest.mark.parametrize("adapter_dtype", [None, SINGLE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, HALF, SINGLE, DOUBLE], ids=dtype_id)
def test_merging_rounds_once_and_unmerging_restores_every_bit(
    device: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None
) -> None:
    if dtype == DOUBLE and adapter_dtype is not None:
        adapter_dtype = DOUBLE
    layer = trained(13, 9, r=4, lora_alpha=3, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    base = layer.weight.detach().clone()
    for _ in range(3):
        layer.eval()
        exact = base.double() + (layer.lora_B.double() @ layer.lora_A.double()).T * layer.scaling
        # One rounding to dtype, and the float32 sum's own error for the wide dtypes.
        unit = max(torch.finfo(dtype).eps / 2, 8 * torch.finfo(SINGLE).eps if dtype != DOUBLE else 1e-15)
        assert ((layer.weight.double() - exact).abs() <= unit * exact.abs().max()).all()
        assert layer.weight.dtype == dtype and layer.weight.stride() == base.stride()
        assert not torch.equal(layer.weight, base) and torch.equal(layer.base_weight, base)
        nn.init.normal_(layer.lora_A)
        layer.train()
        assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_merged_lookups_equal_unmerged_ones(backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    layer = trained(37, 35, r=19, lora_alpha=3, dtype=dtypes[0], adapter_dtype=dtypes[1], device=device)
    layer.requires_grad_(False)
    sum_exactly(layer)
    indices = torch.randint(0, 37, (3, 8), generator=torch.Generator().manual_seed(1)).to(device)
    unmerged = layer(indices)
    merged = layer.eval()(indices)
    if backend == "triton":
        # One kernel does both.
        assert torch.equal(merged, unmerged)
    assert_as_accurate_as(merged, unmerged, lookups_in_float64(layer.train().double(), indices), "merged")


def test_merging_leaves_a_tied_head_alone_and_ties_it_again() -> None:
    emb, head = trained(7, 5, r=2), nn.Linear(5, 7, bias=False)
    head.weight = emb.weight
    shared, bits = emb.weight, emb.weight.detach().clone()
    emb.eval()
    assert head.weight is shared and torch.equal(head.weight, bits) and not torch.equal(emb.weight, bits)
    x = torch.randn(3, 5)
    assert torch.equal(head(x), F.linear(x, bits))
    emb.train()
    assert emb.weight is head.weight is shared and torch.equal(emb.weight, bits)


def test_a_tied_model_stays_tied_when_cast_while_merged() -> None:
    model = nn.ModuleDict({"emb": trained(7, 5, r=2), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["emb"].weight
    expected = model["emb"].weight.detach().double()
    model.eval().double()
    assert torch.equal(model["head"].weight, expected) and not torch.equal(model["emb"].weight, expected)
    model.train()
    assert model["emb"].weight is model["head"].weight and torch.equal(model["emb"].weight, expected)


def test_state_dict_holds_the_unmerged_base_and_loads_into_a_merged_layer(device: str) -> None:
    source, target = (trained(7, 5, r=2, device=device) for _ in range(2))
    state = {name: t.clone() for name, t in source.state_dict().items()}
    for name, tensor in source.eval().state_dict().items():
        assert torch.equal(tensor, state[name]), name
    target.eval().load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.train().weight, state["weight"])


def test_a_merged_layer_in_training_warns() -> None:
    indices = torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="gives lora_A and lora_B no gradient, and the base weight's to"):
        trained(7, 5, r=2).eval()(indices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            trained(7, 5, r=2).eval()(indices)
        Embedding(7, 5).eval()(indices)
        Embedding(7, 5, r=2, merge_weights=False).eval()(indices)


@pytest.mark.parametrize("base", [HALF, torch.float16], ids=dtype_id)
def test_float32_adapters_on_a_half_base(backend: str, device: str, base: torch.dtype) -> None:
    layer = trained(7, 5, r=2, dtype=base, adapter_dtype=SINGLE, device=device)
    assert layer.lora_A.dtype == layer.lora_B.dtype == SINGLE and layer.weight.dtype == base
    y = layer(torch.tensor([1, 2, 1], device=device))
    y.float().sum().backward()
    assert y.dtype == base and layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == SINGLE


def test_from_pretrained_says_what_to_do_instead() -> None:
    table = torch.randn(6, 4)
    with pytest.raises(NotImplementedError, match="from_pretrained was called of a LoRA Embedding; expected its"):
        Embedding.from_pretrained(table)
    layer = Embedding(6, 4, r=2)
    layer.load_state_dict({"weight": table})
    assert torch.equal(layer.weight, table)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": -1}, ValueError, ["r is -1"]),
        ({"r": 2, "lora_alpha": math.nan}, ValueError, ["lora_alpha is nan"]),
        ({"r": 2, "lora_alpha": -math.inf}, ValueError, ["lora_alpha is -inf"]),
        # nn.Embedding's own.
        ({"padding_idx": 6}, AssertionError, ["Padding_idx"]),
        ({"r": 2, "padding_idx": -7}, AssertionError, ["Padding_idx"]),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        Embedding(6, 4, **options)
    assert all(word in str(raised.value) for word in words)
