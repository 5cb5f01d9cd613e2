"""dx and da in one launch: accuracy, addresses, layouts, and which backward takes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora import fused
from fused_lora.kernels import config, dx_and_da
from fused_lora.kernels.config import HOPPER
from fused_lora.kernels.fused_linear import RANK_STEP

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")

# (rows, out_features, in_features, r): tiles of dx that leave programs idle, that leave none, and one more than
# programs; da in one piece and in several; edges in every direction; the most ranks.
SHAPES = [(150, 40, 136, 5), (192, 96, 128, 16), (65, 8, 192, 1), (289, 24, 64, 17), (70, 136, 200, 32)]
DTYPES = {"bfloat16": (torch.bfloat16,) * 2, "mixed": (torch.bfloat16, torch.float32), "float16": (torch.float16,) * 2}


def problem(shape: tuple[int, int, int, int], device: str, dtypes: str = "bfloat16") -> dict[str, Tensor]:
    rows, N, K, r = shape
    if device != "cpu":
        # At least as many tiles for each of a GPU's programs as the interpreter's smaller ones give.
        rows, N, K = 64 * rows, 8 * N, 8 * K
    dtype, adapter_dtype = DTYPES[dtypes]
    sizes = {"dy": (rows, N), "weight": (N, K), "dyb": (rows, r), "x": (rows, K)}
    tensors = {name: torch.randn(*size, device=device).to(dtype) for name, size in sizes.items()}
    return tensors | {"lora_A": torch.randn(r, K, device=device).to(adapter_dtype)}


def computed(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    assert dx_and_da.takes(t["dy"], t["weight"], t["x"], len(t["lora_A"]))
    return dx_and_da.gradients(**t, dtype=t["lora_A"].dtype)


def expected(t: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dy, weight, dyb, x, lora_A = (t[name].to(dtype) for name in ("dy", "weight", "dyb", "x", "lora_A"))
    return dy @ weight + dyb @ lora_A, dyb.T @ x


def check(t: dict[str, Tensor]) -> None:
    (dx, da), exact = computed(t), expected(t, torch.float64)
    dx_of_torch, da_of_torch = expected(t, t["x"].dtype)
    assert_as_accurate_as(dx, dx_of_torch, exact[0], "dx")
    # As autocast would: torch's product in x's dtype, then in the adapter's.
    assert_as_accurate_as(da, da_of_torch.to(t["lora_A"].dtype), exact[1], "da")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_is_as_accurate_as_torch(shape: tuple[int, int, int, int], dtypes: str, device: str) -> None:
    check(problem(shape, device, dtypes))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_takes_any_layout_that_the_copy_engine_reads(shape: tuple[int, int, int, int], device: str) -> None:
    t = problem(shape, device)
    dx, da = computed(t)
    turned = {name: t[name].T.contiguous().T for name in ("weight", "dyb", "lora_A", "x")}
    padded = {name: torch.cat([t[name], t[name]], 1)[:, : t[name].shape[1]] for name in ("dy", "weight")}
    # x is read without it.
    apart = {"x": torch.stack([t["x"], t["x"]], 2)[:, :, 1], "dyb": torch.stack([t["dyb"], t["dyb"]], 1)[:, 0]}
    for other in (turned, padded, apart):
        again = computed(t | other)
        assert torch.equal(again[0], dx) and torch.equal(again[1], da)
    check(t | turned)


def test_does_not_take_what_it_cannot_read_or_has_no_use_for(device: str) -> None:
    t = problem(SHAPES[0], device)
    dy, weight, x, r = t["dy"], t["weight"], t["x"], len(t["lora_A"])
    N, K = weight.shape

    def shifted(matrix: Tensor) -> Tensor:
        return torch.cat([matrix, matrix], 1)[:, 1 : matrix.shape[1] + 1]

    assert dx_and_da.takes(dy, weight, x, r) and dx_and_da.takes(dy, weight, shifted(x), RANK_STEP)
    assert not dx_and_da.takes(shifted(dy), weight, x, r)
    assert not dx_and_da.takes(dy, shifted(weight), x, r)
    assert not dx_and_da.takes(dy, weight, x.float(), r)
    assert not dx_and_da.takes(dy, weight, x, 0)
    assert not dx_and_da.takes(dy, weight, x, RANK_STEP + 1)
    assert not dx_and_da.takes(dy[:, :0], weight[:0], x, r)
    assert not dx_and_da.takes(dy[:0], weight, x[:0], r)
    # A row of dx that is no multiple of 16 bytes, which the copy engine does not store.
    narrow = weight.T.contiguous().T[:, : K - 1]
    assert not dx_and_da.takes(dy, narrow, x[:, : K - 1], r)
    # No more tiles than programs: none computes a second one.
    tile = dx_and_da.tiles_for(dy.device, dy.dtype, N, K).linear
    few = tile.block_m * (config.processors(dy.device) // -(-K // tile.block_j))
    assert not dx_and_da.takes(dy[:few], weight, x[:few], r)


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_every_element_once(shape: tuple[int, int, int, int]) -> None:
    from interpreter import checked_addresses

    rows, N, _, _ = shape
    with checked_addresses() as counts:
        dx, da = computed(problem(shape, "cpu"))
    pieces = -(-rows // dx_and_da.rows_of_task(config.INTERPRETER.linear, rows, N))
    assert counts["launches"] == (2 if pieces > 1 else 1)
    assert not dx.isnan().any() and not da.isnan().any()


def test_da_is_cut_as_long_as_a_tile_of_dx_takes() -> None:
    """2 * outputs rows, of H200's tiles; never more than there are, never less than a step."""
    rows = {
        sizes: dx_and_da.rows_of_task(HOPPER.linear, *sizes) for sizes in ((8192, 4096), (8192, 1024), (16384, 4096))
    }
    assert rows == {(8192, 4096): 8192, (8192, 1024): 2048, (16384, 4096): 8192}
    assert dx_and_da.rows_of_task(HOPPER.linear, 8190, 14336) == 8192
    assert dx_and_da.rows_of_task(HOPPER.linear, 8192, 16) == 64


@pytest.mark.parametrize(
    ("left_out", "masked", "taken"),
    [((), False, True), ((), True, False), (("x",), False, False), (("weight", "lora_A"), False, False)],
    ids=["all", "with a mask", "without da", "without dx"],
)
def test_backward_takes_it_for_both_gradients_without_a_mask(
    monkeypatch: pytest.MonkeyPatch, device: str, left_out: tuple[str, ...], masked: bool, taken: bool
) -> None:
    t = problem(SHAPES[0], device)
    rows, K, r = len(t["x"]), t["x"].shape[1], len(t["lora_A"])
    lora_B = torch.randn(t["dy"].shape[1], r, device=device).to(t["x"].dtype)
    bits = torch.full((rows, -(-K // 8)), 255, dtype=torch.uint8, device=device) if masked else None
    calls, gradients = [], dx_and_da.gradients
    monkeypatch.setattr(dx_and_da, "gradients", lambda *tensors: calls.append(1) or gradients(*tensors))
    given = {name: None if name in left_out else t[name] for name in ("x", "weight", "lora_A")}
    options = {"xa": t["dyb"], "bits": bits, "scaling": 0.5, "dtype": torch.float32, "enable_lora": (True,)}
    dx, da, db = fused.backward(t["dy"], lora_B=lora_B, **given, **options)
    assert len(calls) == taken
    assert (dx is None, da is None, db is None) == ("weight" in left_out, "x" in left_out, False)
    exact = {name: tensor.double() for name, tensor in t.items()} | {"dyb": 0.5 * t["dy"].double() @ lora_B.double()}
    for gradient, truth in zip((dx, da), expected(exact, torch.float64), strict=True):
        # dyb is rounded to bfloat16 on the way to either, and dx once more.
        assert gradient is None or (gradient - truth).abs().max() <= 2**-7 * truth.abs().max()
