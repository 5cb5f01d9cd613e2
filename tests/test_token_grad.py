"""lora_A's gradient from lookups: against float64 and torch's scatter, bit for bit where sums are exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora import fused, reference, use_backend
from fused_lora.functional import lora_embedding
from fused_lora.kernels import token_grad
from fused_lora.kernels.token_grad import BLOCK_M, MOST_RANKS, STEP, grad_lora_A

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")

# (lookups, tokens, r): odd everywhere, several tiles and steps, ranks of two programs, one and none of each
SHAPES = [
    (STEP + BLOCK_M + 3, 37, 5),
    (2 * STEP + 1, 37, MOST_RANKS),
    (BLOCK_M, 1, 16),
    (7, 1000, MOST_RANKS + 3),
    (1, 1, 1),
    (0, 7, 3),
    (9, 5, 0),
]
DTYPES = {"float32": (torch.float32,) * 2, "mixed": (torch.bfloat16, torch.float32), "float16": (torch.float16,) * 2}


def problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A panel [lookups, r] and the tokens that were looked up."""
    lookups, tokens, r = shape
    generator = torch.Generator().manual_seed(sum(shape))
    dyb = torch.randn(lookups, r, generator=generator).to(device, dtype)
    return dyb, torch.randint(tokens, (lookups,), generator=generator).to(device)


def scattered(dyb: Tensor, indices: Tensor, tokens: int, padding_idx: int, by_frequency: bool) -> Tensor:
    """torch's, [r, tokens] in dyb's dtype."""
    da = dyb.new_zeros(tokens, dyb.shape[1]).index_add_(0, indices, dyb)
    if by_frequency:
        da /= indices.bincount(minlength=tokens).clamp(min=1)[:, None]
    if padding_idx >= 0:
        da[padding_idx] = 0
    return da.T


@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("padding_idx", [-1, 0])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_is_as_accurate_as_torch(
    shape: tuple[int, int, int], dtypes: str, padding_idx: int, by_frequency: bool, device: str
) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    dyb, indices = problem(shape, dtype, device)
    options = shape[1], padding_idx, by_frequency
    actual = grad_lora_A(dyb, indices, *options, adapter_dtype)
    assert actual.is_contiguous()
    same_dtype = scattered(dyb, indices, *options).to(adapter_dtype)
    assert_as_accurate_as(actual, same_dtype, scattered(dyb.double(), indices, *options))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_sums_without_rounding_what_float32_can_hold(dtypes: str, index_dtype: torch.dtype, device: str) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    dyb, indices = problem((5 * STEP, 3, 20), dtype, device)
    dyb = (dyb * 4).round()
    exact = scattered(dyb.double(), indices, 3, -1, False)
    actual = grad_lora_A(dyb, indices.to(index_dtype), 3, -1, False, adapter_dtype)
    assert torch.equal(actual, exact.to(adapter_dtype))


@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("r", [16, 33])
def test_any_number_of_lookups(r: int, by_frequency: bool, device: str) -> None:
    for lookups in [*range(1, 2 * BLOCK_M + 2), STEP - 1, STEP + 1]:
        dyb, _ = problem((lookups, 1, r), torch.bfloat16, device)
        # One token twice, at both ends, and all others once.
        indices = torch.arange(lookups, 0, -1, device=device) % (lookups - 1 or 1)
        exact = scattered(dyb.double(), indices, lookups, -1, by_frequency)
        actual = grad_lora_A(dyb, indices, lookups, -1, by_frequency, torch.bfloat16)
        # A sum of two terms, halved or not, is rounded once to float32 and once to bfloat16.
        assert torch.equal(actual, exact.float().bfloat16()), lookups


def test_where_a_token_is_first_does_not_matter(device: str) -> None:
    dyb, _ = problem((2 * STEP + 5, 1, 4), torch.bfloat16, device)
    dyb = (dyb * 4).round()
    for first in (0, 1, BLOCK_M - 1, BLOCK_M, STEP - 1, STEP, 2 * STEP + 3):
        indices = torch.zeros(len(dyb), dtype=torch.int64, device=device)
        indices[first:] = 2
        actual = grad_lora_A(dyb, indices, 4, -1, False, torch.float32)
        assert torch.equal(actual, scattered(dyb.float(), indices, 4, -1, False)), first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("by_frequency", [False, True])
def test_what_is_not_finite_stays_with_its_token_and_rank(dtype: torch.dtype, by_frequency: bool, device: str) -> None:
    dyb, indices = problem((STEP + 9, 11, 6), dtype, device)
    dyb, indices = (dyb * 4).round(), indices % 7
    indices[3:6], indices[-3:] = torch.tensor([8, 9, 10], device=device), torch.tensor([8, 9, 10], device=device)
    dyb[3, 0], dyb[4, 1], dyb[-2, 1], dyb[5, 2], dyb[-1, 2] = math.nan, math.inf, 7, -math.inf, math.inf
    actual = grad_lora_A(dyb, indices, 11, -1, by_frequency, dtype)
    expected = scattered(dyb.double(), indices, 11, -1, by_frequency)
    assert torch.equal(actual.isfinite(), expected.isfinite()) and (~expected.isfinite()).sum() == 3
    assert actual[0, 8].isnan() and actual[1, 9] == math.inf and actual[2, 10].isnan()
    finite = dyb.nan_to_num(0, 0, 0)
    others = grad_lora_A(finite, indices, 11, -1, by_frequency, dtype)
    assert torch.equal(actual[expected.isfinite()], others[expected.isfinite()])


def test_takes_any_strides(device: str) -> None:
    dyb, indices = problem((STEP + 1, 19, 7), torch.bfloat16, device)
    strided = dyb.new_full((2 * len(dyb), 21), math.nan)[::2, ::3].copy_(dyb)
    for other in (dyb.T.contiguous().T, strided):
        arguments = indices, 19, 4, True, torch.float32
        assert torch.equal(grad_lora_A(other, *arguments), grad_lora_A(dyb, *arguments))


@interpreted
@pytest.mark.parametrize("padding_idx", [-1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_the_tokens_that_occur_once(
    shape: tuple[int, int, int], padding_idx: int
) -> None:
    from interpreter import checked_addresses

    dyb, indices = problem(shape, torch.bfloat16, "cpu")
    with checked_addresses() as counts:
        da = grad_lora_A(dyb, indices, shape[1], padding_idx, False, torch.bfloat16)
    written = set(indices.tolist()) - {padding_idx}
    assert counts["stores"] == len(written) * shape[2] and counts["launches"] == (dyb.numel() > 0)
    others = [token for token in range(shape[1]) if token not in written]
    assert not da[:, others].any() and not da.isnan().any()


@pytest.mark.parametrize(
    ("bound", "r", "dtype"),
    [
        ("MOST_LOOKUPS", 8, torch.bfloat16),
        ("MOST_OTHER_LOOKUPS", 8, torch.float32),
        ("MOST_OTHER_LOOKUPS", 3, torch.bfloat16),
        ("MOST_OTHER_LOOKUPS", 72, torch.float16),
        ("MOST_TOKENS", 8, torch.bfloat16),
    ],
    ids=str,
)
def test_beyond_its_bounds_torch_sorts(
    bound: str, r: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> Tensor:
        raise AssertionError("the kernel was launched")

    dyb, indices = problem((9, 9, r), dtype, device)
    dyb = (dyb * 4).round()
    given = dyb, indices, 9, -1, False, torch.float32
    expected = reference.embedding_grad_lora_A(*given)
    monkeypatch.setattr(token_grad, bound, 9)
    with monkeypatch.context() as patched:
        patched.setattr(reference, "in_dtype", refuses)
        assert torch.equal(fused.embedding_grad_lora_A(*given), expected)
    monkeypatch.setattr(token_grad, bound, 8)
    monkeypatch.setattr(token_grad, "grad_lora_A", refuses)
    assert torch.equal(fused.embedding_grad_lora_A(*given), expected)


@pytest.mark.parametrize("requested", ["triton", "unfused"])
def test_an_embeddings_backward_takes_it(requested: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def watched(*arguments: object) -> Tensor:
        calls.append(arguments)
        return grad_lora_A(*arguments)

    monkeypatch.setattr(token_grad, "grad_lora_A", watched)
    lora_A = torch.randn(3, 7, device=device, requires_grad=True)
    with use_backend(requested):
        indices, table = torch.tensor([6, 1, 6], device=device), torch.randn(7, 5, device=device)
        y = lora_embedding(indices, table, lora_A, torch.randn(5, 3, device=device), padding_idx=1)
        y.sum().backward()
    assert len(calls) == 1 and lora_A.grad[:, 6].all() and lora_A.grad.count_nonzero() == 3
