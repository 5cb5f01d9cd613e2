"""Embedding against loralib 0.1.2 and nn.Embedding, and its op against float64 and torch's machinery."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import loralib
import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora
from fused_lora import Embedding
from fused_lora.functional import lora_embedding

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
DTYPES = [(SINGLE, SINGLE), (torch.float16, torch.float16), (HALF, HALF), (HALF, SINGLE), (torch.float16, SINGLE)]
SCALING = 0.75


def dtype_id(value: object) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in value) if isinstance(value, tuple) else str(value)


@dataclass
class Lookup:
    """Inputs of one lookup and the gradient of its output, on one device."""

    indices: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor

    NAMES = ("weight", "lora_A", "lora_B")

    def factors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.NAMES]

    def to(self, dtype: torch.dtype | None = None) -> Lookup:
        """The same values as fresh leaves, in another dtype if one is given."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.factors()]
        return Lookup(self.indices, *leaves, dy=self.dy.to(dtype or self.dy.dtype))


def make_lookup(
    tokens: int, rows: int, columns: int, r: int, *, dtype: torch.dtype, adapter: torch.dtype | None = None, device: str
) -> Lookup:
    """Random tokens of which two of three are the same one, factors of unit scale, all of them to be trained."""
    generator = torch.Generator().manual_seed(tokens * 7919 + rows * 31 + columns * 17 + r)

    def draw(*shape: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, of)

    indices = torch.randint(0, max(1, rows), (tokens,), generator=generator)
    indices[torch.rand(tokens, generator=generator) < 2 / 3] = rows // 2
    adapter = adapter or dtype
    return Lookup(
        indices.to(device),
        draw(rows, columns).requires_grad_(),
        draw(r, rows, of=adapter).requires_grad_(),
        draw(columns, r, of=adapter, scale=max(1, r) ** -0.5).requires_grad_(),
        dy=draw(tokens, columns),
    )


def expression(
    indices: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = SCALING,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """loralib's lookup, for plain autograd."""
    base = F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    update = F.embedding(indices, lora_A.T, padding_idx, scale_grad_by_freq=scale_grad_by_freq) @ lora_B.T
    return base + update * scaling


def fused(indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **options: Any) -> Tensor:
    return lora_embedding(indices, weight, lora_A, lora_B, **{"scaling": SCALING, **options})


def outputs_and_gradients(lookup: Lookup, function: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
    y = function(lookup.indices, *lookup.factors(), **options)
    y.backward(lookup.dy)
    gradients = {f"d{name}": getattr(lookup, name).grad for name in lookup.NAMES}
    return {"y": y.detach(), **{name: g for name, g in gradients.items() if g is not None}}


def assert_matches_float64(lookup: Lookup, **options: Any) -> None:
    mixed = lookup.lora_A.dtype != lookup.weight.dtype
    actual = outputs_and_gradients(lookup, fused, **options)
    with torch.autocast(lookup.dy.device.type, dtype=lookup.weight.dtype, enabled=mixed):
        same_dtype = outputs_and_gradients(lookup.to(), expression, **options)
    exact = outputs_and_gradients(lookup.to(DOUBLE), expression, **options)
    assert actual.keys() == same_dtype.keys() == exact.keys()
    for name, value in actual.items():
        assert_as_accurate_as(value, same_dtype[name], exact[name], name)


def sum_exactly(layer: Embedding) -> None:
    """In the interpreter, rounds the adapter to eighths, of which float32 holds every sum of products.

    There numpy sums a row in an order that depends on where it lies in a tile, which a GPU does not.
    """
    for parameter in (layer.lora_A, layer.lora_B):
        if not parameter.is_cuda:
            parameter.data = (parameter.data * 8).round() / 8


def trained(*arguments: Any, **options: Any) -> Embedding:
    """A layer whose adapter does something."""
    layer = Embedding(*arguments, **options)
    nn.init.normal_(layer.lora_A)
    return layer


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


# (tokens, rows, columns): primes of several tiles each; sizes that fill tiles; single and none of each
SHAPES = [(19, 11, 37), (16, 48, 32), (1, 1, 1), (11, 3, 1), (0, 7, 5), (5, 7, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy_by_shape_and_dtype(
    backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int]
) -> None:
    if device == "cuda" and shape[2] == 0:
        pytest.skip("torch 2.11's embedding_backward, the yardstick, reads out of bounds for 0 columns on a GPU")
    assert_matches_float64(make_lookup(*shape, 3, dtype=dtypes[0], adapter=dtypes[1], device=device))


@pytest.mark.parametrize("r", [1, 3, 16, 33])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy_by_rank(backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype], r: int) -> None:
    assert_matches_float64(make_lookup(11, 13, 17, r, dtype=dtypes[0], adapter=dtypes[1], device=device))


@pytest.mark.parametrize("dtypes", DTYPES[1:4], ids=dtype_id)
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy_where_a_token_occurs_300_times(
    backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    lookup = make_lookup(311, 13, 5, 3, dtype=dtypes[0], adapter=dtypes[1], device=device)
    lookup.indices[:300] = 5
    lookup.indices = lookup.indices[torch.randperm(311, generator=torch.Generator().manual_seed(1)).to(device)]
    # Terms of one sign, so that a sum in a narrow dtype would stop growing.
    lookup.dy, lookup.lora_B = lookup.dy.abs(), lookup.lora_B.detach().abs().requires_grad_()
    exact = outputs_and_gradients(lookup.to(DOUBLE), expression)["dlora_A"]
    assert_matches_float64(lookup)
    # torch, the yardstick above, sums in the narrow dtype on a CPU. Here lora_B, each addend and the sum are rounded
    # once to it, half an eps each, and the 300 steps of the sum itself to float32.
    error = (lookup.lora_A.grad.double() - exact).abs()
    relative = 2 * torch.finfo(dtypes[0]).eps + 300 * torch.finfo(SINGLE).eps
    assert (error <= relative * exact.abs()).all()


@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 6},
        {"padding_idx": -7, "scale_grad_by_freq": True},
        {"scale_grad_by_freq": True},
        {"scaling": -2.5},
        {"scaling": 0.0},
    ],
    ids=str,
)
def test_accuracy_with_options(backend: str, device: str, options: dict[str, Any]) -> None:
    assert_matches_float64(make_lookup(19, 7, 11, 3, dtype=SINGLE, device=device), **options)


@pytest.mark.parametrize("kind", ["transposed", "every third of every other row"])
@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B", "dy"])
def test_accuracy_with_strides(backend: str, device: str, which: str, kind: str) -> None:
    lookup = make_lookup(17, 11, 35, 3, dtype=SINGLE, device=device)
    tensor = getattr(lookup, which).detach()
    if kind == "transposed":
        strided = tensor.T.contiguous().T
    else:
        rows, columns = tensor.shape
        strided = tensor.new_full((2 * rows, 3 * columns), math.nan)[::2, ::3].copy_(tensor)
    setattr(lookup, which, strided if which == "dy" else strided.requires_grad_())
    assert_matches_float64(lookup)


def test_accuracy_with_a_gradient_of_strides_0(backend: str, device: str) -> None:
    # As sum() hands it back.
    lookup = make_lookup(17, 11, 35, 3, dtype=SINGLE, device=device)
    lookup.dy = torch.ones((), device=device).expand(17, 35)
    assert_matches_float64(lookup)


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")
@pytest.mark.parametrize("shape", [(23, 37, 41, 5), (33, 48, 64, 16), (17, 7, 35, 33), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE), (HALF, SINGLE)], ids=dtype_id)
@pytest.mark.usefixtures("poisoned_allocations")
def test_the_kernel_touches_only_its_arguments_and_writes_every_element_once(
    shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")
    from interpreter import checked_addresses

    from fused_lora.kernels.low_rank_update import embedding

    lookup = make_lookup(*shape, dtype=dtypes[0], adapter=dtypes[1], device="cpu")
    weight, lora_A, lora_B = (t.detach() for t in lookup.factors())
    with checked_addresses() as counts:
        y, panel = embedding(lookup.indices, weight, lora_A, lora_B, SCALING)
    assert counts["launches"] == 1 and counts["stores"] == y.numel() + panel.numel()
    assert not y.isnan().any()
    # The panel is one product and one rounding of each element.
    expected = (lora_A.float() * SCALING).to(weight.dtype)[:, lookup.indices].T
    assert torch.equal(panel, expected)


@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE), (HALF, SINGLE)], ids=dtype_id)
def test_same_inputs_same_bits(backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    lookup = make_lookup(50, 11, 37, 5, dtype=dtypes[0], adapter=dtypes[1], device=device)
    first, second = (outputs_and_gradients(lookup.to(), fused) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_adapters_gradients_are_dense_and_laid_out_as_the_adapter(backend: str, device: str) -> None:
    lookup = make_lookup(9, 7, 5, 3, dtype=SINGLE, device=device)
    outputs_and_gradients(lookup, fused, sparse=True)
    for tensor in (lookup.lora_A, lookup.lora_B):
        assert tensor.grad.layout == torch.strided and tensor.grad.stride() == tensor.stride()
        assert tensor.grad.dtype == tensor.dtype


def test_never_changes_an_input_or_a_saved_tensor(backend: str, device: str) -> None:
    lookup = make_lookup(17, 13, 20, 4, dtype=SINGLE, device=device)
    inputs = [lookup.indices, *lookup.factors(), lookup.dy]
    before = [t.detach().clone() for t in inputs]
    y = fused(lookup.indices, *lookup.factors(), padding_idx=6, scale_grad_by_freq=True)
    first, second = (torch.autograd.grad(y, lookup.factors(), lookup.dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(t.detach(), old) for t, old in zip(inputs, before, strict=True))
    for name, mine, again in zip(lookup.NAMES, first, second, strict=True):
        assert torch.equal(mine, again), name


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
    with pytest.warns(UserWarning, match="gives lora_A, lora_B and the base weight no gradient"):
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


def double_lookup() -> Lookup:
    lookup = make_lookup(6, 5, 4, 3, dtype=DOUBLE, device="cpu")
    lookup.indices = torch.tensor([4, 0, 2, 2, 1, 2])
    return lookup


def test_gradcheck() -> None:
    lookup = double_lookup()
    # gradcheck also asks for undefined output gradients, which backward must answer with None.
    assert torch.autograd.gradcheck(lambda *factors: fused(lookup.indices, *factors), lookup.factors())


def test_double_backward_is_refused() -> None:
    lookup = double_lookup()
    y = fused(lookup.indices, *lookup.factors())
    (gradient,) = torch.autograd.grad(y.square().sum(), lookup.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Recorded(TorchDispatchMode):
    """What ran within the block: each op's name and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.calls.append((op.overloadpacket.__name__, arguments))
        return op(*arguments, **(options or {}))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_each_gradient_is_computed_only_if_wanted(wanted: tuple[bool, ...]) -> None:
    whole = double_lookup()
    expected = outputs_and_gradients(whole, fused)
    lookup = double_lookup()
    for name, flag in zip(lookup.NAMES, wanted, strict=True):
        getattr(lookup, name).requires_grad_(flag)
    y = fused(lookup.indices, *lookup.factors())
    assert torch.equal(y, expected["y"]) and y.requires_grad == any(wanted)
    if not any(wanted):
        return
    with Recorded() as recorded:
        y.backward(lookup.dy)
    for name, flag in zip(lookup.NAMES, wanted, strict=True):
        gradient = getattr(lookup, name).grad
        assert (gradient is not None) == flag
        if flag:
            assert torch.equal(gradient, expected[f"d{name}"])
    weight, lora_A, lora_B = wanted
    names = [name for name, _ in recorded.calls]
    assert names.count("embedding_dense_backward") == weight + lora_A
    panels = [arguments for name, arguments in recorded.calls if name == "lora_linear_grad_panels"]
    assert len(panels) == (lora_A or lora_B)
    for _, given_lora_B, given_xa, *_ in panels:
        assert (given_lora_B is not None, given_xa is not None) == (lora_A, lora_B)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("lora_A", "lora_B"), {"indices", "lora_B", "panel"}),
        (("weight", "lora_A", "lora_B"), {"indices", "lora_B", "panel"}),
        (("lora_A",), {"indices", "lora_B"}),
        (("lora_B",), {"panel"}),
        (("weight",), {"indices"}),
    ],
)
def test_saves_only_what_backward_reads(wanted: tuple[str, ...], expected: set[str]) -> None:
    lookup = make_lookup(6, 10, 8, 3, dtype=SINGLE, device="cpu")
    for name in lookup.NAMES:
        getattr(lookup, name).requires_grad_(name in wanted)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(lookup.indices.view(2, 3), *lookup.factors())
    addresses = {getattr(lookup, name).data_ptr(): name for name in ("indices", *lookup.NAMES)}
    assert {addresses.get(t.data_ptr(), "panel") for t in saved} == expected
    assert all(t.shape == (6, 3) for t in saved if t.data_ptr() not in addresses)


@pytest.mark.parametrize(
    ("dtypes", "options"), [((DOUBLE, DOUBLE), (-1, False)), ((HALF, SINGLE), (2, True))], ids=dtype_id
)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype], options: tuple[int, bool]) -> None:
    lookup = make_lookup(6, 5, 4, 3, dtype=dtypes[0], adapter=dtypes[1], device="cpu")
    ops, rest = torch.ops.fused_lora, (0.5, *options, False, "auto")
    plain = [t.detach() for t in lookup.factors()]
    torch.library.opcheck(ops.lora_embedding.default, (lookup.indices, *lookup.factors(), *rest))
    torch.library.opcheck(ops.lora_embedding_forward.default, (lookup.indices.int(), *plain, *rest))


def test_opcheck_of_a_strided_weight() -> None:
    lookup = double_lookup()
    weight = lookup.weight.detach().T.contiguous().T.requires_grad_()
    arguments = (lookup.indices, weight, lookup.lora_A, lookup.lora_B, 0.5, -1, False, False, "auto")
    torch.library.opcheck(torch.ops.fused_lora.lora_embedding.default, arguments)


def test_compile_fullgraph_forward_and_backward(backend: str, device: str) -> None:
    lookup = make_lookup(12, 7, 9, 4, dtype=HALF, adapter=SINGLE, device=device)

    def function(*arguments: Tensor) -> Tensor:
        return fused(*arguments, padding_idx=3, scale_grad_by_freq=True).relu()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = outputs_and_gradients(lookup.to(), function)
    for name, value in outputs_and_gradients(lookup.to(), compiled).items():
        assert torch.equal(value, eager[name]), name


def test_compiled_code_recompiles_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for tokens in (4, 5, 17, 64):
        lookup = make_lookup(tokens, 7, 6, 3, dtype=SINGLE, device="cpu")
        compiled(lookup.indices, *lookup.factors()).sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_layer_compiles_without_a_graph_break_in_both_modes(max_norm: float | None) -> None:
    torch._dynamo.reset()
    layer = trained(7, 5, r=2, max_norm=max_norm)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    indices = torch.tensor([[1, 2], [2, 6]])
    for mode in (True, False):
        layer.train(mode)
        twin.train(mode)
        with torch.set_grad_enabled(mode):
            mine, other = compiled(indices), twin(indices)
        assert torch.equal(mine, other) and torch.equal(layer.weight, twin.weight)
        if mode:
            mine.sum().backward()
            other.sum().backward()
            assert torch.equal(layer.lora_A.grad, twin.lora_A.grad)
            assert torch.equal(layer.lora_B.grad, twin.lora_B.grad)


def test_export_keeps_the_op_and_its_gradients() -> None:
    layer = trained(7, 5, r=3, lora_alpha=2, padding_idx=2)
    indices = torch.tensor([[1, 2, 2], [2, 6, 1]])
    program = torch.export.export(layer, (indices,))
    assert sum(node.target is torch.ops.fused_lora.lora_embedding.default for node in program.graph.nodes) == 1
    module = program.module()
    assert torch.equal(module(indices), layer(indices))
    module(indices).square().sum().backward()
    layer(indices).square().sum().backward()
    exported = dict(module.named_parameters())
    for name in ("lora_A", "lora_B"):
        assert torch.equal(exported[name].grad, getattr(layer, name).grad), name
    assert exported["weight"].grad is None


@pytest.mark.parametrize(
    ("dtypes", "compiled"),
    [((SINGLE, SINGLE), False), ((torch.float16, SINGLE), False), ((SINGLE, SINGLE), True)],
    ids=dtype_id,
)
def test_autocast_changes_neither_dtype_nor_bits_as_with_nn_embedding(
    backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype], compiled: bool
) -> None:
    lookup = make_lookup(16, 7, 20, 4, dtype=dtypes[0], adapter=dtypes[1], device=device)
    function = fused
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(lookup.to(), fused)
    with torch.autocast(device, dtype=HALF):
        # Backward inside the region too: autocast must not reach into it.
        actual = outputs_and_gradients(lookup.to(), function)
        with torch.no_grad():
            actual["y without gradients"] = function(lookup.indices, *lookup.factors())
    expected["y without gradients"] = expected["y"]
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_merging_in_an_autocast_region_gives_the_bits_of_merging_outside(backend: str, device: str) -> None:
    layer = trained(13, 9, r=4, device=device)
    expected = copy.deepcopy(layer).eval().weight
    with torch.autocast(device, dtype=HALF):
        layer.eval()
    assert torch.equal(layer.weight, expected)


def test_no_grad_inference_mode_and_meta(device: str) -> None:
    lookup = make_lookup(6, 7, 5, 3, dtype=SINGLE, device=device)
    expected = fused(lookup.indices, *lookup.factors())
    with torch.no_grad():
        y = fused(lookup.indices, *lookup.factors())
        assert not y.requires_grad and torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(fused(lookup.indices, *lookup.factors()), expected)
    meta = [t.detach().to("meta").requires_grad_() for t in lookup.factors()]
    y = fused(lookup.indices.view(2, 3).to("meta"), *meta)
    y.sum().backward()
    assert y.shape == (2, 3, 5) and y.is_meta
    assert [t.grad.shape for t in meta] == [t.shape for t in meta] and all(t.grad.is_meta for t in meta)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"max_norm": 0.5}], ids=str)
def test_meta_device_then_to_empty_then_reset_parameters(options: dict[str, Any]) -> None:
    meta = Embedding(7, 5, r=2, device="meta", **options)
    indices = torch.zeros(2, 3, dtype=torch.long, device="meta")
    with torch.no_grad():
        assert meta(indices).shape == meta.eval()(indices).shape == (2, 3, 5)
    layers = [meta.train().to_empty(device="cpu"), Embedding(7, 5, r=2, **options)]
    for layer in layers:
        torch.manual_seed(1)
        layer.reset_parameters()
    for mine, other in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(mine, other) and not mine.is_meta


X, W, A, B = torch.tensor([0, 5, 2]), torch.randn(6, 4), torch.randn(3, 6), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"indices": X.float()}, TypeError, ["indices", "float32", "int32", "int64"]),
        ({"indices": X.bool()}, TypeError, ["indices", "bool", "int64"]),
        ({"indices": X.to(torch.uint8)}, TypeError, ["indices", "uint8", "int64"]),
        ({"indices": X.to("meta")}, ValueError, ["indices", "meta", "cpu"]),
        ({"weight": W[0]}, ValueError, ["weight", "(4,)", "(num_embeddings, embedding_dim)"]),
        ({"weight": W.long()}, ValueError, ["weight", "int64", "floating"]),
        ({"weight": W.T}, ValueError, ["lora_A", "(3, 6)", "(r, 4)", "weight"]),
        ({"weight": W.to("meta")}, ValueError, ["lora_A", "cpu", "meta", "weight"]),
        ({"weight": W.double()}, TypeError, ["lora_A", "float32", "float64", "weight"]),
        ({"lora_A": A[:, :5]}, ValueError, ["lora_A", "(3, 5)", "(r, 6)"]),
        ({"lora_A": A[0]}, ValueError, ["lora_A", "(6,)", "(r, 6)"]),
        ({"lora_A": A[:2]}, ValueError, ["lora_B", "(4, 3)", "(4, 2)", "lora_A"]),
        ({"lora_A": A.to("meta")}, ValueError, ["lora_A", "meta", "cpu"]),
        ({"lora_A": A.half(), "lora_B": B.half()}, TypeError, ["lora_A", "float16", "float32"]),
        ({"lora_A": A.long(), "lora_B": B.long()}, TypeError, ["lora_A", "int64", "float32"]),
        ({"lora_B": B.T}, ValueError, ["lora_B", "(3, 4)", "(4, 3)"]),
        ({"lora_B": B[:, :2]}, ValueError, ["lora_B", "(4, 2)", "(4, 3)"]),
        ({"lora_B": B[0]}, ValueError, ["lora_B", "(3,)", "(4, 3)"]),
        ({"lora_B": B.to("meta")}, ValueError, ["lora_B", "meta", "cpu"]),
        ({"lora_B": B.half()}, TypeError, ["lora_B", "float16", "float32"]),
        ({"weight": W.half(), "lora_B": B.half()}, TypeError, ["lora_B", "float16", "float32", "lora_A"]),
        ({"padding_idx": 6}, ValueError, ["padding_idx", "6"]),
        ({"padding_idx": -7}, ValueError, ["padding_idx", "-7", "6"]),
        ({"scaling": math.inf}, ValueError, ["scaling", "inf", "finite"]),
        ({"scaling": math.nan}, ValueError, ["scaling", "nan", "finite"]),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        lora_embedding(**{"indices": X, "weight": W, "lora_A": A, "lora_B": B, **changes})
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("changes", [{"padding_idx": 6}, {"scaling": math.nan}, {"lora_B": B.half()}], ids=range(3))
def test_rank_0_checks_its_arguments_too(changes: dict[str, Any]) -> None:
    arguments = {"indices": X, "weight": W, "lora_A": A[:0], "lora_B": B[:, :0], **changes}
    if "lora_B" in changes:
        arguments["lora_B"] = B[:, :0].half()
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        lora_embedding(**arguments)


def test_rank_0_is_a_plain_lookup() -> None:
    weight = W.clone().requires_grad_()
    y = lora_embedding(X, weight, A[:0], B[:, :0], padding_idx=-1, scale_grad_by_freq=True)
    assert torch.equal(y, F.embedding(X, W))
    y.sum().backward()
    assert weight.grad.any(1).tolist() == [True, False, True, False, False, False]


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
