"""The dropout contract: which bits, independent of everything but seed, row and column."""

from __future__ import annotations

import pytest
import torch

from fused_lora.reference import Dropout, dropout_threshold, philox


def words(seed: int, block: int, row: int) -> list[int]:
    counter = [torch.tensor(word) for word in (block, row & 0xFFFFFFFF, row >> 32, 0)]
    return [int(word) for word in philox(torch.tensor(seed), tuple(counter))]


def philox_by_the_paper(seed: int, block: int, row: int) -> list[int]:
    """Salmon et al. 2011, in Python's unbounded integers."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    x = [block, row & 0xFFFFFFFF, row >> 32, 0]
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * x[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 1 << 32)
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return x


@pytest.mark.parametrize(
    ("seed", "block", "row", "expected"),
    [
        (0, 0, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (0x123456789ABCDEF0, 5, 3, [0xD55627B0, 0xF0B99270, 0x8D72410B, 0x69C0FF6B]),
        (2**63 - 1, 1000, 2**33 + 7, [0x4074B483, 0xC1FBEEDF, 0x4CC3B9D8, 0xCBF10494]),
    ],
)
def test_philox_check_vectors(seed: int, block: int, row: int, expected: list[int]) -> None:
    assert words(seed, block, row) == expected
    assert philox_by_the_paper(seed, block, row) == expected


def test_mask_check_vectors(device: str) -> None:
    mask = Dropout(torch.tensor([42], device=device), dropout_threshold(0.1)).mask(3, 24)
    assert ["".join(str(int(keep)) for keep in row) for row in mask] == [
        "111111101111111111111111",
        "011111011101111111111111",
        "110011101110111111111101",
    ]


@pytest.mark.parametrize(("row", "column"), [(0, 3), (5, 8), (2**31 - 2, 13), (2**33 + 1, 8 * (2**31 + 5) + 3)])
def test_a_shard_draws_its_part_of_the_whole_mask(row: int, column: int) -> None:
    seed, threshold = torch.tensor([-7]), dropout_threshold(0.3)
    mask = Dropout(seed, threshold, row, column).mask(9, 21)
    for i, j in [(0, 0), (8, 20), (3, 11)]:
        word = philox_by_the_paper(-7, (column + j) // 8, row + i)[(column + j) % 8 // 2]
        assert bool(mask[i, j]) == ((word >> 16 * ((column + j) % 2) & 0xFFFF) >= threshold)
    shard = Dropout(seed, threshold, row + 4, column + 5).mask(5, 10)
    assert torch.equal(shard, mask[4:, 5:15])


def test_mask_does_not_depend_on_the_chunks_it_is_drawn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = Dropout(torch.tensor([1]), dropout_threshold(0.5))
    whole = dropout.mask(37, 50)
    monkeypatch.setattr("fused_lora.reference._SCRATCH_BLOCKS", 15)
    assert torch.equal(dropout.mask(37, 50), whole)


def test_mask_depends_on_the_seed_by_value_and_on_all_its_bits() -> None:
    threshold = dropout_threshold(0.5)
    masks = [Dropout(torch.tensor([0]), threshold).mask(8, 64)]
    assert torch.equal(Dropout(torch.tensor([0]), threshold).mask(8, 64), masks[0])
    for bit in range(64):
        seed = torch.tensor([1 << bit if bit < 63 else -(2**63)])
        masks.append(Dropout(seed, threshold).mask(8, 64))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 65


def test_a_lane_equal_to_the_threshold_is_kept() -> None:
    # Seed 0, row 0, column 0: the lane is the low half of the check vector's first word, 0xB709.
    seed = torch.tensor([0])
    assert Dropout(seed, 0xB709).mask(1, 1).item() and not Dropout(seed, 0xB70A).mask(1, 1).item()


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.0, 0), (1e-9, 0), (0.1, 6554), (0.5, 32768), (0.999999, 65535), (1.0, 65535)]
)
def test_threshold(p: float, threshold: int) -> None:
    assert dropout_threshold(p) == threshold


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_mask_statistics(p: float) -> None:
    rows, columns = 1024, 1024
    dropout = Dropout(torch.tensor([20261122]), dropout_threshold(p))
    keep = dropout.mask(rows, columns).double()
    q = dropout.keep_probability
    # Standard scores of means and of correlations between neighbours; 5 sigma fails once in 1.7 million honest draws.
    sigma = (q * (1 - q)) ** 0.5
    score = (keep - q) / sigma
    assert abs(score.mean()) * (rows * columns) ** 0.5 < 5
    for shifted, here in (
        (score[1:], score[:-1]),
        (score[:, 1:], score[:, :-1]),
        (score[:, 8:], score[:, :-8]),
        (Dropout(torch.tensor([20261123]), dropout.threshold).mask(rows, columns).double().sub(q).div(sigma), score),
    ):
        assert abs((shifted * here).mean()) * here.numel() ** 0.5 < 5
    for axis in (0, 1):
        chi_square = (score.mean(axis) ** 2 * 1024).sum()
        # Chi-square with 1024 degrees of freedom: mean 1024, standard deviation 45.
        assert abs(chi_square - 1024) < 5 * 2048**0.5
