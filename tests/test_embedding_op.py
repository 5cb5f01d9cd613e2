"""Embedding's op against float64 and torch's machinery."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
from lookups import (
    DOUBLE,
    DTYPES,
    HALF,
    SCALING,
    SINGLE,
    Lookup,
    assert_matches_float64,
    dtype_id,
    expression,
    fused,
    make_lookup,
    outputs_and_gradients,
    trained,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import Embedding
from fused_lora.functional import lora_embedding

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
    with pytest.raises(RuntimeError, match="first derivatives"):
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
    assert names.count("embedding_dense_backward") == weight
    adapters = [arguments for name, arguments in recorded.calls if name == "lora_embedding_backward"]
    assert len(adapters) == (lora_A or lora_B)
    for _, *given, _, _, _, _, _, _ in adapters:
        assert [tensor is not None for tensor in given] == [lora_A, lora_A, lora_B]


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
    panel = torch.randn(6, 3).to(dtypes[0])
    backward = (5, *options, 0.5, dtypes[1], "auto")
    for given in ((lookup.indices, plain[2], panel), (lookup.indices, plain[2], None), (None, None, panel)):
        torch.library.opcheck(ops.lora_embedding_backward.default, (lookup.dy, *given, *backward))


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
