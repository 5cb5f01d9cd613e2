"""lora_linear as users call it: shapes of x, options, and what it says to bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeable import complaint
from numerics import make_problem, unfused

from fused_lora.functional import effective_weight, lora_embedding, lora_linear
from fused_lora.reference import Dropout, dropout_threshold

W, A, B, X = torch.randn(6, 4), torch.randn(3, 4), torch.randn(6, 3), torch.randn(5, 4)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (5, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (2, 0, 3, 4)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = lora_linear(x, W, A, B)
    torch.testing.assert_close(y, unfused(x, W, A, B, None, 1.0))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x.transpose(0, 1), lambda x: x[:, 1:3, 1:5]])
def test_views_of_x(view: Any) -> None:
    x = view(torch.randn(4, 4, 8)[..., : 8 if view(torch.empty(4, 4, 8)).shape[-1] == 4 else 4])
    torch.testing.assert_close(lora_linear(x, W, A, B), unfused(x, W, A, B, None, 1.0))


def test_fan_in_fan_out_uses_the_transposed_weight_and_gives_it_its_gradient() -> None:
    weight = W.T.contiguous().requires_grad_()
    y = lora_linear(X, weight, A, B, fan_in_fan_out=True)
    torch.testing.assert_close(y, lora_linear(X, W, A, B))
    y.sum().backward()
    assert weight.grad is not None and weight.grad.shape == (4, 6)


def test_rank_0_is_a_plain_linear() -> None:
    bias = torch.randn(6)
    assert torch.equal(lora_linear(X, W, A[:0], B[:, :0], bias=bias), torch.nn.functional.linear(X, W, bias))


def test_p_1_switches_the_term_off_with_zero_gradients() -> None:
    lora_A, lora_B = A.clone().requires_grad_(), B.clone().requires_grad_()
    y = lora_linear(X, W, lora_A, lora_B, dropout_p=1.0, training=True)
    torch.testing.assert_close(y, X @ W.T)
    y.sum().backward()
    assert torch.equal(lora_A.grad, torch.zeros_like(A)) and torch.equal(lora_B.grad, torch.zeros_like(B))


def test_dropout_is_off_outside_training_and_at_0() -> None:
    plain = lora_linear(X, W, A, B)
    state = torch.get_rng_state()
    assert torch.equal(lora_linear(X, W, A, B, dropout_p=0.9), plain)
    assert torch.equal(lora_linear(X, W, A, B, dropout_p=0.0, training=True), plain)
    assert torch.equal(torch.get_rng_state(), state), "no seed is needed, so none may be drawn"


def test_seed_as_a_number_or_a_tensor_wherever_it_lies() -> None:
    outputs = [
        lora_linear(X, W, A, B, dropout_p=0.5, training=True, seed=seed)
        for seed in (7, torch.tensor([7]), torch.tensor([0, 7])[1:], torch.tensor(7), torch.tensor([[[7]]]))
    ]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert not torch.equal(lora_linear(X, W, A, B, dropout_p=0.5, training=True, seed=8), outputs[0])


def test_manual_seed_fixes_the_mask_and_every_call_draws_another() -> None:
    def draw() -> torch.Tensor:
        return lora_linear(X, W, A, B, dropout_p=0.5, training=True)

    torch.manual_seed(1)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)


def test_the_mask_in_use_is_the_contracts_forward_and_backward() -> None:
    # With W = 0 and rank 8 of identity matrices, y is the dropped x itself and dx the dropped dy.
    x = torch.rand(40, 8).add(1).requires_grad_()
    eye = torch.eye(8)
    y = lora_linear(x, torch.zeros(8, 8), eye, eye, dropout_p=0.25, training=True, seed=99, row_offset=3)
    y.backward(torch.ones_like(y))
    keep = Dropout(torch.tensor([99]), dropout_threshold(0.25), 3).mask(40, 8)
    torch.testing.assert_close(y, keep * x / 0.75)
    torch.testing.assert_close(x.grad, keep / 0.75)


def test_shards_with_offsets_add_up_to_the_whole() -> None:
    problem = make_problem(10, 24, 6, 4, dtype=torch.float64, device="cpu")
    x, weight, lora_A, lora_B = (t.detach() for t in problem.arguments()[:4])
    options = {"dropout_p": 0.5, "training": True, "seed": 5}
    whole = lora_linear(x, weight, lora_A, lora_B, **options)
    parts = [
        sum(
            lora_linear(
                x[rows, columns],
                weight[:, columns],
                lora_A[:, columns],
                lora_B,
                row_offset=rows.start,
                column_offset=columns.start,
                **options,
            )
            for columns in (slice(0, 11), slice(11, 24))
        )
        for rows in (slice(0, 3), slice(3, 10))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": X[:, :3]}, ValueError, ["x", "(5, 3)", "(..., 4)"]),
        ({"x": X.long()}, TypeError, ["x", "int64", "floating"]),
        ({"x": torch.tensor(1.0)}, ValueError, ["x", "in_features"]),
        ({"weight": W[0]}, ValueError, ["weight", "(4,)", "(out_features, in_features)"]),
        ({"weight": W.T}, ValueError, ["x", "(5, 4)", "(..., 6)"]),
        ({"lora_A": A[:, :2]}, ValueError, ["lora_A", "(3, 2)", "(r, 4)"]),
        ({"lora_A": A[0]}, ValueError, ["lora_A", "(4,)"]),
        ({"lora_B": B[:5]}, ValueError, ["lora_B", "(5, 3)", "(6, r)"]),
        ({"lora_B": B[:, :2]}, ValueError, ["lora_B", "(6, 2)", "(6, 3)", "rank"]),
        ({"bias": torch.zeros(5)}, ValueError, ["bias", "(5,)", "(6,)"]),
        ({"weight": W.to("meta")}, ValueError, ["weight", "meta", "cpu"]),
        ({"lora_B": B.to("meta")}, ValueError, ["lora_B", "meta", "cpu"]),
        ({"weight": W.half()}, TypeError, ["weight", "float16", "float32"]),
        ({"bias": torch.zeros(6).double()}, TypeError, ["bias", "float64", "float32"]),
        ({"lora_A": A.half(), "lora_B": B.half()}, TypeError, ["lora_A", "float16", "float32"]),
        ({"lora_B": B.double()}, TypeError, ["lora_B", "float64", "float32"]),
        ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1", "[0, 1]"]),
        ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5", "[0, 1]"]),
        ({"dropout_p": math.nan}, ValueError, ["dropout_p", "nan"]),
        ({"scaling": math.inf}, ValueError, ["scaling", "inf", "finite"]),
        ({"scaling": math.nan}, ValueError, ["scaling", "nan", "finite"]),
        ({"scaling": None}, ValueError, ["scaling is None", "a finite number"]),
        ({"scaling": "2"}, ValueError, ["scaling is '2'", "a finite number"]),
        ({"scaling": torch.ones(2)}, ValueError, ["scaling is tensor([1., 1.])", "a finite number"]),
        (
            {"scaling": torch.tensor(2.0, requires_grad=True)},
            TypeError,
            ["scaling is a Tensor that requires a gradient"],
        ),
        ({"row_offset": 1.5}, TypeError, ["row_offset is 1.5", "an int"]),
        ({"column_offset": None}, TypeError, ["column_offset is None", "an int"]),
        ({"row_offset": -1}, ValueError, ["row_offset", "-1"]),
        ({"column_offset": 2**35 - 3}, ValueError, ["column_offset", str(2**35 - 3), "2**35"]),
        ({"column_offset": -8}, ValueError, ["column_offset", "-8"]),
        ({"weight": W[0], "fan_in_fan_out": True}, ValueError, ["weight", "(4,)"]),
        ({"seed": 2**63}, ValueError, ["seed", str(2**63), "64"]),
        ({"seed": torch.tensor([1.0])}, ValueError, ["seed", "float32", "int64"]),
        ({"seed": torch.tensor([1, 2])}, ValueError, ["seed", "(2,)"]),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    arguments = {"x": X, "weight": W, "lora_A": A, "lora_B": B, "dropout_p": 0.5, "training": True, **changes}
    with pytest.raises(error) as raised:
        lora_linear(**arguments)
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.jagged])
def test_x_of_another_layout_is_refused(layout: torch.layout) -> None:
    x = X.to_sparse() if layout == torch.sparse_coo else torch.nested.nested_tensor([X, X[:2]], layout=layout)
    assert complaint(lambda: lora_linear(x, W, A, B)) == f"x has layout {layout}; expected a strided tensor."


def test_no_function_takes_a_scaling_that_would_get_no_gradient() -> None:
    scaling = torch.nn.Parameter(torch.tensor(2.0))
    for call in (
        lambda: lora_embedding(torch.tensor([1]), W, torch.zeros(3, 6), torch.zeros(4, 3), scaling=scaling),
        lambda: effective_weight(W, A, B, scaling=scaling),
    ):
        with pytest.raises(TypeError, match=r"scaling is a Tensor that requires a gradient; expected a number\."):
            call()
    assert torch.equal(lora_linear(X, W, A, B, scaling=scaling.detach()), lora_linear(X, W, A, B, scaling=2.0))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5)),
    wanted=st.lists(st.booleans(), min_size=4, max_size=4),
    transposed=st.booleans(),
    p=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_any_shape_layout_and_set_of_gradients(leading, sizes, wanted, transposed, p) -> None:
    in_features, out_features, r = sizes
    x = torch.randn(*leading, in_features, dtype=torch.float64)
    if transposed and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    weight, lora_A, lora_B = (
        torch.randn(size, dtype=torch.float64)
        for size in ((out_features, in_features), (r, in_features), (out_features, r))
    )
    results = []
    for function in ("ours", "theirs"):
        inputs = [t.clone().requires_grad_(flag) for t, flag in zip((x, weight, lora_A, lora_B), wanted, strict=True)]
        if function == "ours":
            y = lora_linear(*inputs, scaling=0.5, dropout_p=p, training=True, seed=4)
        else:
            keep = torch.ones(x.numel() // in_features, in_features, dtype=torch.bool) if p < 1 else None
            q = 1.0
            if 0 < p < 1:
                dropout = Dropout(torch.tensor([4]), dropout_threshold(p))
                keep, q = dropout.mask(x.numel() // in_features, in_features), dropout.keep_probability
            y = unfused(*inputs, None, 0.0 if p == 1 else 0.5, None if keep is None else keep.view(x.shape), q)
        if y.requires_grad:
            y.sum().backward()
        results.append([y.detach()] + [t.grad for t in inputs])
    for ours, theirs in zip(*results, strict=True):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs)
        else:
            # Without a LoRA term (r = 0) torch gives the adapter empty gradients, or none.
            assert theirs is None or theirs.numel() == 0
