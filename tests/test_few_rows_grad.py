"""Both of an adapter's gradients in one launch: their accuracy, and every address that is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora import unfused
from fused_lora.kernels.few_rows_grad import few_rows_grad

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")

# (rows, in_features, out_features, r): odd everywhere, several steps over the rows, ranks in pieces, and none at all
SHAPES = [(1, 64, 96, 16), (37, 53, 141, 5), (70, 130, 16, 130), (1, 1, 1, 1), (0, 5, 6, 3), (4, 0, 6, 3), (4, 5, 0, 3)]
DTYPES = {"float32": (torch.float32,) * 2, "mixed": (torch.bfloat16, torch.float32), "float16": (torch.float16,) * 2}


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, masked: bool
) -> dict[str, Tensor | None]:
    rows, K, N, r = shape
    sizes = {"dy": (rows, N), "dyb": (rows, r), "x": (rows, K), "xa": (rows, r)}
    tensors = {name: torch.randn(*size, device=device).to(dtype) for name, size in sizes.items()}
    bits = torch.randint(256, (rows, -(-K // 8)), dtype=torch.uint8, device=device) if masked else None
    return {**tensors, "bits": bits}


def expected(t: dict[str, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In the tensors' own dtype, and then in the gradients'."""
    x = t["x"]
    if t["bits"] is not None:
        lanes = torch.arange(8, device=x.device, dtype=torch.uint8)
        x = x * ((t["bits"][:, :, None] >> lanes) & 1).flatten(1)[:, : x.shape[1]]
    return (t["dyb"].T @ x).to(dtype), (t["dy"].T @ t["xa"]).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("poisoned_allocations")
def test_is_as_accurate_as_torch(shape, dtypes: str, masked: bool, device: str) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    t = problem(shape, dtype, device, masked)
    wide = {name: value.double() if name != "bits" else value for name, value in t.items()}
    actual, same_dtype, exact = (
        few_rows_grad(**t, dtype=adapter_dtype),
        expected(t, adapter_dtype),
        expected(wide, torch.float64),
    )
    for name, *values in zip(("da", "db"), actual, same_dtype, exact, strict=True):
        assert values[0].dtype == adapter_dtype and values[0].shape == values[2].shape
        assert_as_accurate_as(*values, name)


@pytest.mark.parametrize("missing", ["x", "xa", "both"])
def test_each_gradient_alone_is_what_it_is_beside_the_other(missing: str, device: str) -> None:
    t = problem((37, 53, 141, 5), torch.bfloat16, device, True)
    both = few_rows_grad(**t, dtype=torch.float32)
    without = {"x": ("x", "bits"), "xa": ("xa",), "both": ("x", "xa", "bits")}[missing]
    da, db = few_rows_grad(**t | dict.fromkeys(without), dtype=torch.float32)
    assert da is None if "x" in without else torch.equal(da, both[0])
    assert db is None if "xa" in without else torch.equal(db, both[1])


def test_takes_any_strides(device: str) -> None:
    t = problem((37, 53, 141, 5), torch.float32, device, False)
    strided = {name: None if value is None else value.T.contiguous().T for name, value in t.items()}
    strided["dy"], t["dy"] = (torch.ones(1, 1, device=device).expand(37, 141) for _ in range(2))
    for once, again in zip(*(few_rows_grad(**each, dtype=torch.float32) for each in (t, strided)), strict=True):
        assert torch.equal(once, again)


@interpreted
@pytest.mark.parametrize(
    ("rows", "dtype", "launched"),
    [(16, torch.bfloat16, True), (17, torch.bfloat16, False), (16, torch.float32, False)],
    ids=str,
)
def test_db_alone_of_few_rows_is_a_launch(
    rows: int, dtype: torch.dtype, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an embedding's is, which has no x; the bound is that of a GPU, scaled for the interpreter."""
    calls = []

    def watched(*arguments: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        calls.append(arguments)
        return few_rows_grad(*arguments)

    monkeypatch.setattr(unfused, "few_rows_grad", watched)
    dy, xa = (torch.randn(rows, size).round().to(dtype) for size in (24, 5))
    dyb, db = unfused.grad_panels(dy, None, xa, scaling=2.0, dtype=torch.float32)
    # Sums of small integers.
    assert dyb is None and torch.equal(db, dy.float().T @ xa.float()) and bool(calls) == launched


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_every_element_once(shape) -> None:
    from interpreter import checked_addresses

    with checked_addresses() as counts:
        da, db = few_rows_grad(**problem(shape, torch.bfloat16, "cpu", True), dtype=torch.bfloat16)
    assert counts["launches"] == 1 and not da.isnan().any() and not db.isnan().any()
