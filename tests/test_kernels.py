"""The launchers one by one: every address they touch, every element they write, their masks, and what they state."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from numerics import assert_as_accurate_as

triton = pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

import fused_lora.reference as reference  # noqa: E402
from fused_lora import fused, unfused  # noqa: E402
from fused_lora.kernels import (  # noqa: E402
    adapter_grad,
    config,
    decode,
    extended,
    fused_linear,
    low_rank_update,
    mask,
    panel,
    reduce,
)
from fused_lora.reference import Dropout, dropout_threshold  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")

# (rows, in_features, out_features, r): odd everywhere, a multiple of 16 bytes everywhere, tails of each dimension
SHAPES = [(37, 53, 41, 5), (33, 64, 72, 16), (65, 24, 136, 33), (1, 1, 1, 1), (16, 40, 64, 130)]


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    m, k, n, r = shape
    sizes = {"x": (m, k), "weight": (n, k), "lora_A": (r, k), "lora_B": (n, r), "dy": (m, n), "bias": (n,)}
    drawn = {name: torch.randn(*size, device=device).to(dtype) for name, size in sizes.items()}
    return drawn | {"tokens": torch.arange(m if n else 0, device=device) * 7 % max(1, n)}


def run_all(module, t: dict[str, torch.Tensor], dropout: Dropout | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every function of a path's module on one problem; lora_A and lora_B.T serve as an embedding's, too."""
    factors = t["lora_A"], t["lora_B"]
    y, xa, bits = module.forward(t["x"], t["weight"], t["bias"], *factors, scaling=0.5, dropout=dropout)
    options = {"scaling": 0.5, "dtype": dtype}
    dyb, _ = module.grad_panels(t["dy"], t["lora_B"], xa, **options)
    inputs = t["dy"], t["x"], t["weight"], *factors, xa
    dx, da, db = module.backward(*inputs, bits=bits, enable_lora=[True], **options)
    effective = module.effective_weight(t["weight"], t["lora_A"], t["lora_B"], scaling=0.5)
    embedded, panel = module.embedding(t["tokens"], t["weight"], t["lora_B"].T, t["lora_A"].T, scaling=0.5)
    linear = {"y": y, "xa": xa, "dyb": dyb, "db": db, "dx": dx, "da": da} | ({} if bits is None else {"bits": bits})
    return linear | {"effective weight": effective, "embedded": embedded, "embedding's panel": panel}


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", [fused, unfused], ids=["fused", "unfused"])
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_every_element_once(
    module: ModuleType, shape, dtype: torch.dtype, p: float
) -> None:
    from interpreter import checked_addresses

    t = tensors(shape, dtype, "cpu")
    dropout = Dropout(torch.tensor([1]), dropout_threshold(p)) if p > 0 else None
    with checked_addresses() as counts:
        results = run_all(module, t, dropout, dtype)
    # xa, y, dx; dyb and db with their reduction, twice; da; two low-rank updates. Or a mask drawn, a
    # mask used, and the updates. Of many 16-bit ranks torch computes xa, and dyb once, and few rows' da and db are one.
    by_torch = dtype == torch.bfloat16 and shape[3] > 32
    assert counts["launches"] >= ((7 if by_torch else 10) if module is fused else 4 if p > 0 else 2)
    assert not [name for name, value in results.items() if value.isnan().any()]


@interpreted
def test_the_address_check_sees_an_overrun_and_a_double_write() -> None:
    import triton.language as tl
    from interpreter import checked_addresses

    @triton.jit
    def overrun(x_ptr, SIZE: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, SIZE), 1.0)

    @triton.jit
    def twice(x_ptr, SIZE: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, SIZE) // 2, 1.0)

    with checked_addresses(), pytest.raises(Exception, match="lie outside every argument"):
        overrun[(1,)](torch.zeros(7), SIZE=8)
    with checked_addresses(), pytest.raises(AssertionError, match="written more than once"):
        twice[(1,)](torch.zeros(8), SIZE=8)


@pytest.mark.parametrize("r", [1, 16, 40])
@pytest.mark.parametrize(("row_offset", "column_offset"), [(0, 0), (2**33 + 5, 8), (3, 2**34 + 3)])
def test_masks_are_the_contracts_bits_in_every_kernel(device: str, row_offset: int, column_offset: int, r: int) -> None:
    """Each kernel, given ones and unit vectors, gives back keep itself; panels by way of 1/q."""
    rows, columns = 45, 56
    dropout = Dropout(torch.tensor([77], device=device), dropout_threshold(0.25), row_offset, column_offset)
    keep, bits = dropout.mask(rows, columns).float(), dropout.bits(rows, columns)
    assert 0 < keep.mean() < 1
    ones = torch.ones(rows, columns, device=device)
    eye = torch.eye(columns, device=device)
    for start in range(0, columns, r):
        some = eye[start : start + r]
        from_forward, drawn = panel.panel(ones, some.T, dropout.keep_probability, dropout)
        assert torch.equal(drawn, bits)
        torch.testing.assert_close(from_forward, keep[:, start : start + r], rtol=0, atol=1e-6)
    # One column of the panel is 1, so dx is keep in every column.
    dyb = torch.zeros(rows, r, device=device)
    dyb[:, 0] = 1
    factor = torch.zeros(r, columns, device=device)
    factor[0] = 1
    dx = fused_linear.grad_input(
        torch.zeros(rows, 8, device=device), torch.zeros(8, columns, device=device), dyb, factor, bits
    )
    assert torch.equal(dx, keep)
    # Row i's unit vector picks row i of the mask out of the sum over rows.
    for start in range(0, rows, r):
        picked = torch.eye(rows, device=device)[:, start : start + r].contiguous()
        da = adapter_grad.grad_lora_A(picked, ones, bits, torch.float32)
        assert torch.equal(da, keep[start : start + r])
    dropped, drawn = mask.drop(ones, dropout)
    assert torch.equal(drawn, bits)
    alone, beside = torch.zeros_like(ones), torch.ones_like(ones)
    # dyb @ factor is one everywhere.
    assert mask.add_kept_(alone, dyb, torch.ones_like(factor), bits, None) is None
    again = mask.add_kept_(beside, 2 * dyb, torch.ones_like(factor), bits, ones)
    for masked in (dropped, mask.drop_again(ones, bits), alone, again, (beside - 1) / 2):
        assert torch.equal(masked, keep)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the interpreter's tiles, unused on a GPU")
def test_a_panel_that_draws_a_mask_has_a_tile_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(panel, "launch", lambda kernel, tensors, facts, others, made: steps.append(others()[1]))
    for dropout in (None, Dropout(torch.tensor([1]), 6554)):
        panel.panel(torch.ones(4, 32), torch.ones(32, 1), 1.0, dropout)
    assert [step["BLOCK_I"] for step in steps] == [
        tile[16].block_i for tile in (config.INTERPRETER.panel, config.INTERPRETER.drawn_panel)
    ]
    assert steps[0]["BLOCK_I"] != steps[1]["BLOCK_I"]


@pytest.mark.parametrize("columns", [192, 96, 200])
def test_stored_bits_are_read_by_words_of_every_width(device: str, columns: int) -> None:
    """Rows that start at multiples of eight, four and one bytes; the last tile's edge lies within the matrix."""
    rows = 45
    dropout = Dropout(torch.tensor([77], device=device), dropout_threshold(0.25))
    keep, bits = dropout.mask(rows, columns).float(), dropout.bits(rows, columns)
    nothing = torch.zeros(rows, 8, device=device), torch.zeros(8, columns, device=device)
    ones = torch.ones(rows, 1, device=device), torch.ones(1, columns, device=device)
    assert torch.equal(fused_linear.grad_input(*nothing, *ones, bits), keep)
    da = adapter_grad.grad_lora_A(torch.eye(rows, device=device), ones[1].expand(rows, -1), bits, torch.float32)
    assert torch.equal(da, keep)


@pytest.mark.parametrize(
    ("seed", "row_offset", "column_offset", "lane"),
    [(0, 0, 0, 0xB709), (0x123456789ABCDEF0, 3, 40, 0x27B0)],
)
def test_mask_keeps_a_lane_equal_to_the_threshold(
    device: str, seed: int, row_offset: int, column_offset: int, lane: int
) -> None:
    """The lanes are the low halves of the contract's check vectors, one of them under a seed of 61 bits."""
    one = torch.ones(1, 1, device=device)
    for threshold, kept in ((lane, 1.0), (lane + 1, 0.0)):
        dropout = Dropout(torch.tensor([seed], device=device), threshold, row_offset, column_offset)
        assert panel.panel(one, one, dropout.keep_probability, dropout)[0].item() == kept


LANES = [
    (0, column, lane) for column, lane in enumerate((0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73))
]
# Words whose low half is zero, so that comparing a whole word with the threshold in its high half can go wrong.
BARE_LANES = [(46474, 1, 0x953A), (79267, 3, 0x1121), (4780, 5, 0xCF53), (45599, 7, 0x2D70)]


@pytest.mark.parametrize(("row", "column", "lane"), [*LANES, *BARE_LANES])
def test_mask_keeps_each_lane_equal_to_the_threshold(device: str, row: int, column: int, lane: int) -> None:
    """The eight lanes of the contract's first check vector, that of zeros, and words of other rows under that seed."""
    ones, unit = torch.ones(1, 8, device=device), torch.eye(8, device=device)[:, column : column + 1]
    for threshold, kept in ((lane, 1.0), (lane + 1, 0.0)):
        dropout = Dropout(torch.tensor([0], device=device), threshold, row)
        assert dropout.mask(1, 8)[0, column].item() == kept
        assert mask.drop(ones, dropout)[0][0, column].item() == kept
        assert panel.panel(ones, unit, dropout.keep_probability, dropout)[0].item() == kept


@pytest.mark.parametrize("threshold", [1, 2, 255, 256, 32767, 32768, 32769, 65534, 65535])
def test_masks_of_thresholds_where_a_half_overflows_or_changes_its_sign(device: str, threshold: int) -> None:
    """On a GPU, where other instructions compare them, of so many lanes that dozens are equal to any threshold."""
    rows = 8 if device == "cpu" else 1024
    dropout = Dropout(torch.tensor([9], device=device), threshold)
    expected = dropout.bits(rows, 2048)
    ones = torch.ones(rows, 2048, device=device, dtype=torch.bfloat16)
    assert torch.equal(mask.drop(ones, dropout)[1], expected)
    assert torch.equal(panel.panel(ones, ones[:1].T, 1.0, dropout)[1], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("module", [fused, unfused], ids=["fused", "unfused"])
def test_each_launcher_is_as_accurate_as_the_reference(module, device: str, dtype: torch.dtype, shape) -> None:
    t = tensors(shape, dtype, device)
    dropout = Dropout(torch.tensor([5], device=device), dropout_threshold(0.2))
    wide = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
    exact = run_all(reference, wide, dropout, torch.float64)
    same_dtype, actual = run_all(reference, t, dropout, dtype), run_all(module, t, dropout, dtype)
    assert torch.equal(actual.pop("bits"), exact["bits"])
    for name, value in actual.items():
        assert_as_accurate_as(value, same_dtype[name], exact[name], name)


def test_db_and_dyb_alone_equal_what_they_are_together(device: str) -> None:
    t = tensors((70, 30, 90, 8), torch.float32, device)
    xa = torch.randn(70, 8, device=device)
    options = {"scaling": 0.5, "dtype": torch.float32}
    dyb, db = fused.grad_panels(t["dy"], t["lora_B"], xa, **options)
    only_dyb, nothing = fused.grad_panels(t["dy"], t["lora_B"], None, **options)
    assert nothing is None
    nothing, only_db = fused.grad_panels(t["dy"], None, xa, **options)
    assert nothing is None and torch.equal(only_db, db)
    torch.testing.assert_close(only_dyb, dyb)


@pytest.mark.parametrize("module", [fused, unfused], ids=["fused", "unfused"])
@pytest.mark.usefixtures("poisoned_allocations")
def test_empty_sizes_give_zeros_and_launch_nothing_out_of_range(module: ModuleType, device: str) -> None:
    for m, k, n in ((0, 5, 6), (4, 0, 6), (4, 5, 0)):
        t = tensors((m, k, n, 3), torch.float32, device)
        results = run_all(module, t, None, torch.float32)
        expected = run_all(reference, t, None, torch.float32)
        for name, value in results.items():
            torch.testing.assert_close(value, expected[name], msg=f"{name} at {(m, k, n)}")


def test_reduce_sums_in_float32_and_rounds_once(device: str) -> None:
    partials, others = torch.randn(37, 3, 421, device=device), torch.randn(3, 1000, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        alone, nothing = reduce.reduce(partials, dtype, 0.5)
        assert nothing is None
        first, second = reduce.reduce(partials, dtype, 0.5, (others, torch.float32))
        assert torch.equal(first, alone)
        exact, other_exact = partials.double().sum(0) * 0.5, others.double().sum(0)
        assert_as_accurate_as(alone, exact.to(dtype), exact)
        assert_as_accurate_as(second, other_exact.float(), other_exact)


def test_kernels_state_their_work() -> None:
    """launch_metadata is what profilers read; the numbers are those of the mathematics."""
    x, out = torch.empty(8, 64, dtype=torch.bfloat16), torch.empty(8, 32, dtype=torch.bfloat16)
    right, xa, factor = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(8, 4), torch.empty(4, 32)
    arguments = {
        "left_ptr": x,
        "right_ptr": right,
        "panel_ptr": xa,
        "factor_ptr": factor,
        "bias_ptr": None,
        "bits_ptr": torch.empty(8, 4, dtype=torch.uint8),
        "out_ptr": out,
    }
    arguments |= {"M": 8, "J": 32, "I": 64, "R": 4, "BLOCK_M": 4, "BLOCK_J": 16, "first_tile": 0}
    work = extended.work(None, None, arguments)
    assert work["flops16"] == 2 * 8 * 32 * 64 + 2 * 8 * 4 * 32
    assert work["bytes"] == 2 * (8 * 64 + 64 * 32 + 8 * 32) + 4 * (8 * 4 + 4 * 32) + 8 * 4
    # Three of four tiles.
    later = extended.work(None, None, arguments | {"first_tile": 1})
    assert (later["flops16"], later["bytes"]) == (0.75 * work["flops16"], work["bytes"] - 2 * 8 * 32 / 4)
    # Two of three slices of 64 columns, which are all that is read.
    left, xa = torch.empty(8, 192, dtype=torch.bfloat16), torch.empty(8, 8, dtype=torch.bfloat16)
    b = torch.empty(128, 4)
    arguments = {"left_ptr": left, "factor_ptr": b, "panel_ptr": xa, "M": 8, "I": 64, "R": 4, "ENABLED": 0b101}
    arguments |= {"bits_ptr": None}
    work = panel._work(None, None, arguments)
    assert work["flops16"] == 2 * 8 * 128 * 4
    assert work["bytes"] == 2 * 8 * 128 + 4 * 128 * 4 + 2 * 8 * 8
    arguments |= {"panel_ptr": xa, "grad_ptr": torch.empty(3, 128, 4), "product_ptr": torch.empty(2, 8, 8)}
    work = adapter_grad._work(None, None, arguments)
    assert work["flops16"] == 2 * (2 * 8 * 128 * 4)
    arguments = {"x_ptr": x, "weight_ptr": right.T, "lora_A_ptr": torch.empty(4, 64), "lora_B_ptr": torch.empty(32, 4)}
    arguments |= {"out_ptr": out, "bias_ptr": None, "drawn_ptr": None, "bits_ptr": None, "N": 32}
    arguments |= {"BLOCK_M": 4, "BLOCK_N": 16}
    # Four tiles, and three of them.
    whole, first = (decode._work(None, None, arguments | {"first_tiles": tiles}) for tiles in (None, 3))
    assert whole["flops16"] == 2 * 8 * 32 * 64 + 2 * 8 * 4 * (64 + 32)
    assert whole["bytes"] == 2 * (8 * 64 + 64 * 32 + 8 * 32) + 4 * 4 * (64 + 32)
    assert first["flops16"] == 0.75 * 2 * 8 * 32 * (64 + 4) + 2 * 8 * 4 * 64
    assert first["bytes"] == whole["bytes"] - 2 * 8 * 32 / 4
    weight, index = torch.empty(50, 16), torch.empty(8, dtype=torch.int64)
    arguments = {"index_ptr": index, "out_ptr": weight[:8], "left_ptr": torch.empty(50, 4), "panel_ptr": None, "R": 4}
    arguments |= {"M": 8}
    work = low_rank_update._work(None, None, arguments | {"right_ptr": torch.empty(4, 16)})
    assert work["flops32"] == 2 * 8 * 16 * 4
    assert work["bytes"] == 8 * 8 + 4 * (8 * 16 + 8 * 4 + 4 * 16 + 8 * 16)


def test_tables_are_complete_and_frozen() -> None:
    for table in (*config.TABLES.values(), config.SAFE, config.IRREGULAR, config.FLOAT32, config.INTERPRETER):
        for of_rank in (table.panel, table.drawn_panel, table.adapter_grad, table.grad_lora_A):
            assert set(of_rank) == set(config.RANK_BLOCKS)
        with pytest.raises(AttributeError):
            table.update = None  # type: ignore[misc]
        with pytest.raises(TypeError):
            table.panel[16] = table.panel[32]  # type: ignore[index]


@pytest.mark.parametrize(("r", "block"), [(1, 16), (16, 16), (17, 32), (128, 128), (129, 128), (1000, 128)])
def test_rank_block(r: int, block: int) -> None:
    assert config.rank_block(r) == block
