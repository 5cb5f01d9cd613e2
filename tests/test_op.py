"""The op: accuracy against float64, gradients, what it saves, and how torch's machinery sees it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from numerics import Problem, assert_as_accurate_as, make_problem, unfused
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora.functional import lora_linear
from fused_lora.reference import Dropout, dropout_threshold
from fused_lora.reference import forward as reference_forward

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
SCALING = 0.75


def outputs_and_gradients(problem: Problem, function) -> dict[str, torch.Tensor]:
    y = function(*problem.arguments())
    y.backward(problem.dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in problem.gradients().items() if g is not None}}


def assert_matches_float64(*problems: Problem, p: float, row_offset: int = 0, column_offset: int = 0) -> None:
    """The largest errors over all problems, which are of one size."""
    results = [compared(problem, p, row_offset, column_offset) for problem in problems]
    for name in results[0][0]:
        ours, same_dtype, exact = (torch.stack([result[kind][name] for result in results]) for kind in range(3))
        assert_as_accurate_as(ours, same_dtype, exact, name)


def compared(problem: Problem, p: float, row_offset: int, column_offset: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Our results, torch's in the same dtype, and the exact ones."""
    rows, columns = problem.x.shape
    seed = torch.tensor([1234567], device=problem.x.device)
    dropout = Dropout(seed, dropout_threshold(p), row_offset, column_offset) if p > 0 else None
    keep = None if dropout is None else dropout.mask(rows, columns)
    q = 1.0 if dropout is None else dropout.keep_probability

    def ours(x, weight, lora_A, lora_B, bias):
        return lora_linear(
            x,
            weight,
            lora_A,
            lora_B,
            bias=bias,
            scaling=SCALING,
            dropout_p=p,
            training=True,
            seed=seed,
            row_offset=row_offset,
            column_offset=column_offset,
        )

    def theirs(x, weight, lora_A, lora_B, bias):
        return unfused(x, weight, lora_A, lora_B, bias, SCALING, keep, q)

    mixed = problem.lora_A.dtype != problem.x.dtype
    actual = outputs_and_gradients(problem, ours)
    yardstick = Problem(
        *(None if t is None else t.detach().requires_grad_() for t in problem.arguments()), dy=problem.dy
    )
    with torch.autocast(problem.x.device.type, dtype=problem.x.dtype, enabled=mixed):
        same_dtype = outputs_and_gradients(yardstick, theirs)
    exact = outputs_and_gradients(problem.to(DOUBLE), theirs)
    assert actual.keys() == same_dtype.keys() == exact.keys()
    return actual, same_dtype, exact


SHAPES = [
    # primes and one-offs around the tile sizes
    (37, 53, 41),
    (65, 129, 67),
    # sizes whose rows start at multiples of 16 bytes, on which the kernels load by descriptor
    (37, 48, 136),
    (70, 96, 64),
    # more rows than the GEMM groups tiles of
    (270, 16, 70),
    # single rows, columns and tokens
    (1, 16, 1),
    (1, 1, 1),
    (3, 1, 17),
    # empty
    (0, 24, 8),
    (5, 0, 8),
    (5, 8, 0),
]
DTYPES = [(SINGLE, SINGLE), (torch.float16, torch.float16), (HALF, HALF), (HALF, SINGLE), (torch.float16, SINGLE)]


def dtype_id(dtypes: object) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes) if isinstance(dtypes, tuple) else str(dtypes)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy_by_shape_and_dtype(backend: str, device: str, dtypes, shape, p: float) -> None:
    # Of a single number torch may be right by luck, so that its error is no measure; of 16 draws it is not.
    draws = range(16 if shape[0] * shape[2] <= 16 else 1)
    options = {"dtype": dtypes[0], "adapter_dtype": dtypes[1], "device": device}
    assert_matches_float64(*(make_problem(*shape, 8, **options, number=number) for number in draws), p=p)


@pytest.mark.parametrize("r", [1, 3, 7, 8, 16, 33, 64, 100, 128, 256])
@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE), (HALF, SINGLE)], ids=dtype_id)
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy_by_rank(backend: str, device: str, dtypes, r: int) -> None:
    problem = make_problem(19, 43, 37, r, dtype=dtypes[0], adapter_dtype=dtypes[1], bias=False, device=device)
    assert_matches_float64(problem, p=0.3)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [12, 70])
@pytest.mark.parametrize("r", [33, 65, 130])
def test_accuracy_of_many_ranks(backend: str, device: str, r: int, rows: int, p: float) -> None:
    """Of which cuBLAS computes panels, with few rows and with more."""
    assert_matches_float64(make_problem(rows, 48, 136, r, dtype=HALF, adapter_dtype=SINGLE, device=device), p=p)


@pytest.mark.parametrize(
    ("row_offset", "column_offset"), [(0, 8), (2**31 + 3, 16), (2**33 + 1, 5), (7, 8 * 2**29 + 3), (0, 2**31 - 27)]
)
def test_accuracy_with_offsets(backend: str, device: str, row_offset: int, column_offset: int) -> None:
    problem = make_problem(21, 39, 25, 4, dtype=SINGLE, device=device)
    assert_matches_float64(problem, p=0.5, row_offset=row_offset, column_offset=column_offset)


def strided(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same values under other strides."""
    detached = tensor.detach()
    if kind == "transposed":
        return detached.T.contiguous().T.requires_grad_()
    if kind == "every-other-row":
        wide = detached.new_full((2 * len(detached), *detached.shape[1:]), float("nan"))
        wide[::2] = detached
        return wide[::2].requires_grad_()
    wide = detached.new_full((*detached.shape[:-1], 3 * detached.shape[-1]), float("nan"))
    wide[..., ::3] = detached
    return wide[..., ::3].requires_grad_()


MATRICES = product(["x", "weight", "lora_A", "lora_B", "dy"], ["transposed", "every-other-row", "every-third-column"])


@pytest.mark.parametrize(("which", "kind"), [*MATRICES, ("bias", "every-other-row")])
def test_accuracy_with_strides(backend: str, device: str, which: str, kind: str) -> None:
    problem = make_problem(23, 40, 31, 5, dtype=SINGLE, device=device)
    changed = strided(kind, getattr(problem, which))
    setattr(problem, which, changed.detach() if which == "dy" else changed)
    assert_matches_float64(problem, p=0.2)


def test_agrees_with_plain_autograd_over_the_reference() -> None:
    problem = make_problem(9, 11, 7, 3, dtype=DOUBLE, device="cpu")
    seed = torch.tensor([5])
    dropout = Dropout(seed, dropout_threshold(0.4))
    actual = outputs_and_gradients(
        problem,
        lambda x, w, a, b, bias: lora_linear(x, w, a, b, bias=bias, scaling=2.0, dropout_p=0.4, training=True, seed=5),
    )
    expected = outputs_and_gradients(
        problem.to(DOUBLE),
        lambda x, w, a, b, bias: reference_forward(x, w, bias, a, b, scaling=2.0, dropout=dropout)[0],
    )
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-13, msg=name)


def op(*tensors: torch.Tensor | None, p: float = 0.3, seed: int = 3) -> torch.Tensor:
    x, weight, bias, lora_A, lora_B = tensors
    return lora_linear(
        x, weight, lora_A, lora_B, bias=bias, scaling=0.5, dropout_p=p, training=True, seed=seed if p > 0 else None
    )


def double_inputs() -> list[torch.Tensor]:
    problem = make_problem(6, 10, 4, 3, dtype=DOUBLE, device="cpu")
    return [problem.x, problem.weight, problem.bias, problem.lora_A, problem.lora_B]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_with_a_fixed_mask(p: float) -> None:
    # gradcheck also asks for undefined output gradients, which backward must answer with None.
    assert torch.autograd.gradcheck(lambda *t: op(*t, p=p), double_inputs())


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)))
def test_each_gradient_is_computed_only_if_wanted(wanted: tuple[bool, ...]) -> None:
    everything = double_inputs()
    op(*everything).sum().backward()
    inputs = [t.detach().requires_grad_(flag) for t, flag in zip(everything, wanted, strict=True)]
    y = op(*inputs)
    if not any(wanted):
        assert not y.requires_grad
        return
    with fused_lora.count_paths() as ran:
        y.sum().backward()
    for ours, flag, whole in zip(inputs, wanted, everything, strict=True):
        assert (ours.grad is not None) == flag
        if flag:
            assert torch.equal(ours.grad, whole.grad)
    x, _, _, lora_A, lora_B = wanted
    assert ran["backward/reference"] == (x or lora_A or lora_B)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("x", "lora_A", "lora_B"), {"x", "weight", "lora_A", "lora_B", "panel", "bits"}),
        (("lora_A", "lora_B"), {"x", "lora_B", "panel", "bits"}),
        (("lora_B",), {"panel"}),
        (("x",), {"weight", "lora_A", "lora_B", "bits"}),
        (("bias",), set()),
        (("weight",), {"x"}),
    ],
)
def test_saves_only_what_backward_reads(wanted: tuple[str, ...], expected: set[str]) -> None:
    problem = make_problem(6, 10, 4, 3, dtype=SINGLE, device="cpu")
    for name in problem.NAMES:
        getattr(problem, name).requires_grad_(name in wanted)
    seed = torch.tensor([1])
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(
            problem.x,
            problem.weight,
            problem.lora_A,
            problem.lora_B,
            bias=problem.bias,
            dropout_p=0.5,
            training=True,
            seed=seed,
        )
    addresses = {getattr(problem, name).data_ptr(): name for name in problem.NAMES}
    made = {torch.float32: ("panel", (6, 3)), torch.uint8: ("bits", (6, 2))}
    assert {addresses.get(t.data_ptr(), made[t.dtype][0]) for t in saved} == expected
    assert all(t.shape == made[t.dtype][1] for t in saved if t.data_ptr() not in addresses)


def test_never_changes_an_input_or_a_saved_tensor(backend: str, device: str) -> None:
    problem = make_problem(17, 24, 20, 4, dtype=SINGLE, device=device)
    before = [t.detach().clone() for t in problem.arguments()]
    y = lora_linear(*problem.arguments()[:4], bias=problem.bias, dropout_p=0.5, training=True, seed=3)
    gradients = []
    for _ in range(2):
        for t in problem.arguments():
            t.grad = None
        y.backward(problem.dy, retain_graph=True)
        gradients.append(problem.gradients())
    for name, old in zip(problem.NAMES, before, strict=True):
        assert torch.equal(getattr(problem, name).detach(), old)
        assert torch.equal(gradients[0][name], gradients[1][name]), name


def test_same_inputs_same_bits(backend: str, device: str) -> None:
    problem = make_problem(70, 90, 80, 8, dtype=HALF, adapter_dtype=SINGLE, device=device)
    runs = []
    for _ in range(2):
        fresh = Problem(
            *(None if t is None else t.detach().clone().requires_grad_() for t in problem.arguments()), dy=problem.dy
        )
        runs.append(outputs_and_gradients(fresh, lambda x, w, a, b, c: op(x, w, c, a, b)))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_double_backward_is_refused() -> None:
    inputs = double_inputs()
    (dx,) = torch.autograd.grad(op(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "transposed weight", "every other row"])
def test_opcheck(layout: str) -> None:
    x, weight, bias, lora_A, lora_B = double_inputs()
    if layout == "transposed weight":
        weight = weight.detach().T.contiguous().T.requires_grad_()
    if layout == "every other row":
        x = torch.cat([x, x]).detach()[::2].requires_grad_()
    seed = torch.tensor([3])
    ops = torch.ops.fused_lora
    arguments = (x, weight, bias, lora_A, lora_B, [True], seed, 0.5, 0.3, 0, 0, "auto")
    torch.library.opcheck(ops.lora_linear.default, arguments)
    torch.library.opcheck(ops.lora_linear.default, (x, weight, None, lora_A, lora_B, [True], None, *arguments[7:]))
    plain = [None if t is None else t.detach() for t in (x, weight, bias, lora_A, lora_B)]
    y, xa, bits = ops.lora_linear_forward(*plain, *arguments[5:])
    torch.library.opcheck(ops.lora_linear_forward.default, (*plain, *arguments[5:]))
    x, weight, _, lora_A, lora_B = plain
    rest = ([True], 0.5, 0.3, DOUBLE, "auto")
    for wanted in (
        (x, weight, lora_A, lora_B, xa, bits),
        (None, None, None, None, xa, None),
        (x, None, None, lora_B, None, bits),
        (None, weight, lora_A, lora_B, None, None),
    ):
        torch.library.opcheck(ops.lora_linear_backward.default, (y, *wanted, *rest))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend: str, device: str, compiler: str, p: float) -> None:
    problem = make_problem(12, 20, 9, 4, dtype=SINGLE, device=device)

    def function(x, weight, lora_A, lora_B, bias):
        return lora_linear(x, weight, lora_A, lora_B, bias=bias, dropout_p=p, training=True, seed=11).sin()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    eager = outputs_and_gradients(problem, function)
    again = Problem(*(t.detach().requires_grad_() for t in problem.arguments()), dy=problem.dy)
    for name, value in outputs_and_gradients(again, compiled).items():
        # The op's bits are the same; Inductor may fuse sin with other rounding.
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-5, msg=name)


def test_compile_draws_the_masks_that_eager_draws() -> None:
    problem = make_problem(12, 20, 9, 4, dtype=SINGLE, device="cpu")

    def function(x, weight, lora_A, lora_B):
        return lora_linear(x, weight, lora_A, lora_B, dropout_p=0.5, training=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled, compiled):
        torch.manual_seed(77)
        results.append(f(*problem.arguments()[:4]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert not torch.equal(compiled(*problem.arguments()[:4]), results[0])


def test_compiled_code_recompiles_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: op(*t), fullgraph=True, backend=counter)
    for rows in (4, 5, 17, 64):
        problem = make_problem(rows, 10, 6, 3, dtype=SINGLE, device="cpu")
        compiled(problem.x, problem.weight, problem.bias, problem.lora_A, problem.lora_B).sum().backward()
    assert counter.frame_count <= 2


def test_compiled_code_follows_use_backend() -> None:
    torch._dynamo.reset()
    problem = make_problem(4, 10, 6, 3, dtype=SINGLE, device="cpu")
    compiled = torch.compile(lambda *t: lora_linear(*t), fullgraph=True, backend="aot_eager")
    compiled(*problem.arguments()[:4])
    with pytest.raises(RuntimeError, match="forced to triton"), fused_lora.use_backend("triton"):
        compiled(*(t.double() for t in problem.arguments()[:4]))


def test_export_keeps_the_op_and_its_gradients() -> None:
    layer = fused_lora.Linear(10, 6, r=3, lora_alpha=2)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 10)
    program = torch.export.export(layer, (x,))
    assert sum(node.target is torch.ops.fused_lora.lora_linear.default for node in program.graph.nodes) == 1
    module = program.module()
    assert torch.equal(module(x), layer(x))
    module(x).square().sum().backward()
    layer(x).square().sum().backward()
    exported = dict(module.named_parameters())
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(exported[name].grad, parameter.grad), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(backend: str, device: str, use_reentrant: bool) -> None:
    def run(wrapped: bool):
        problem = make_problem(15, 24, 24, 4, dtype=SINGLE, device=device)

        def block(x):
            hidden = lora_linear(x, problem.weight, problem.lora_A, problem.lora_B, dropout_p=0.5, training=True).relu()
            return lora_linear(hidden, problem.weight, problem.lora_A, problem.lora_B, dropout_p=0.5, training=True)

        torch.manual_seed(9)
        y = checkpoint(block, problem.x, use_reentrant=use_reentrant) if wrapped else block(problem.x)
        y.backward(problem.dy)
        return y, problem.gradients()

    plain_y, plain = run(False)
    y, gradients = run(True)
    assert torch.equal(y, plain_y)
    for name in ("x", "weight", "lora_A", "lora_B"):
        assert torch.equal(gradients[name], plain[name]), name


def test_no_grad_inference_mode_and_meta(device: str) -> None:
    problem = make_problem(5, 12, 7, 3, dtype=SINGLE, device=device)
    expected = lora_linear(*problem.arguments()[:4])
    with torch.no_grad():
        y = lora_linear(*problem.arguments()[:4])
        assert not y.requires_grad and torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(lora_linear(*problem.arguments()[:4]), expected)
    meta = [t.detach().to("meta").requires_grad_() for t in problem.arguments()[:4]]
    y = lora_linear(*meta, dropout_p=0.1, training=True)
    y.sum().backward()
    assert y.shape == (5, 7) and meta[2].grad.shape == (3, 12) and meta[0].grad.is_meta


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_nn_linear_and_keeps_float32_gradients(device: str, compiled: bool) -> None:
    problem = make_problem(16, 24, 20, 4, dtype=SINGLE, device=device)
    function = lora_linear
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=HALF):
        y = function(*problem.arguments()[:4], bias=problem.bias)
        # Backward inside the region too: autocast must not reach into it.
        y.backward(problem.dy.to(HALF))
    assert y.dtype == HALF
    exact = outputs_and_gradients(problem.to(DOUBLE), lambda x, w, a, b, c: unfused(x, w, a, b, c, 1.0))
    twin = Problem(*(t.detach().requires_grad_() for t in problem.arguments()), dy=problem.dy.to(HALF))
    with torch.autocast(device, dtype=HALF):
        theirs = unfused(*twin.arguments(), 1.0)
    theirs.backward(twin.dy)
    assert_as_accurate_as(y, theirs, exact["y"], "y")
    for name, gradient in problem.gradients().items():
        assert gradient.dtype == SINGLE
        assert_as_accurate_as(gradient, twin.gradients()[name], exact[f"d{name}"], name)


def test_autocast_leaves_float64_alone() -> None:
    problem = make_problem(4, 6, 5, 2, dtype=DOUBLE, device="cpu")
    with torch.autocast("cpu", dtype=HALF):
        y = lora_linear(*problem.arguments()[:4])
    assert torch.equal(y, lora_linear(*problem.arguments()[:4])) and y.dtype == DOUBLE
