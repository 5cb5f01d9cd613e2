"""The path of a linear layer's forward and of its backward: whichever takes the least time, as far as it was measured.

All numbers are from Hopper GPUs; see benchmarks/NOTES.md. Of others only what is said of any GPU is taken.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .dispatch import BATCH_INVARIANT, Choice, choose

# On any GPU: rows, and rows together with the fewer features, from which the kernels take less time than cuBLAS; and
# rows of whatever is bound by reading the weight.
_FEWEST_ROWS, _FEWEST_OUTPUTS, _FEW_DECODED = 2048, 1 << 21, 64
# Rows of a forward that is one launch, and its ranks. Of more ranks at most so many elements of the panel, or of lora_A
# beside many outputs, or few of all rows. And of more than _MANY_RANKS, up to the last, few rows of so many inputs.
_DECODED, _DECODED_RANKS, _LARGEST_DECODED_FACTOR, _SMALL_PANEL = 512, 64, 1 << 19, 1 << 14
_HIDING_OUTPUTS, _FEWER_OUTPUTS = 8192, 1 << 19
_MANY_RANKS, _MOST_DECODED_RANKS, _MOST_INPUTS_OF_MOST = 128, 256, 8192
# Of one that draws a mask. With up to _MANY_RANKS, and few rows of more, where outputs are so many times the inputs,
# beside at most so many elements of the mask, which are drawn meanwhile. Of so many inputs at most: with up to
# _FEW_RANKS as many rows, with up to _DECODED_RANKS more rows where outputs are few. Of more ranks a few more rows
# where outputs are many or so few, and of more than _MANY_RANKS so few rows of no fewer outputs. Of no more rows than
# the last no whole waves of tiles.
_FEW_RANKS, _MOST_DRAWN_FEATURES = 32, 4096
_FEW_DRAWN_ROWS, _FEW_DRAWN_OUTPUTS, _FEWEST_DIVIDED_ROWS = 1024, 1 << 20, 256
_HIDING_TIMES, _HIDDEN_MASK = 2, 1 << 20
_ROWS_OF_MANY_RANKS, _OUTPUTS_OF_MANY_RANKS = 128, 1 << 17
_ROWS_OF_MOST_RANKS, _FEWEST_OUTPUTS_OF_MOST, _TOO_FEW_FOR_WAVES = 16, 4096, 256
# Of a backward that is one launch but for the adapter's gradients: rows, and the features on both sides; and where few
# ranks make lora_B's rows short, which the panel's few programs read slowly, the features that they go through.
_DECODED_BACK, _DECODED_FEATURES, _FEW_INNER = 128, 4096, 1024
# Of one that draws none: for more rows no fewer outputs, and with less than _FEWEST_ROWS no more features; of rows and
# outputs together less than the last. With _FEWEST_ROWS and more, where no gradient is wanted.
_FEWEST_DECODED_OUTPUTS, _MOST_DECODED, _TOO_MUCH_DECODED = 2048, 8192, 1 << 25
# Which part of the multiprocessors one launch must keep busy.
_BUSY = 0.8
# Of rows and outputs together; with fewer, one launch takes as little time as two that compute the panel in the first
# wave.
_FEWEST_OUTPUTS_OF_WAVES = 1 << 24
# Which part a GEMM's tiles must keep busy to take less time than cuBLAS, which has tiles for any size; where what is
# saved beside the GEMM is a larger part of it, less; with a mask; and the rows together with the fewer features.
_FULL, _FULL_ENOUGH, _FULL_DRAWN, _FEWEST_FULL = 0.85, 0.78, 0.84, 1 << 20

_FEW_ROWS = Choice("unfused", f"cuBLAS takes less time for fewer than {_FEWEST_ROWS} rows")
_FEW_TILES = Choice("unfused", "cuBLAS takes less time where the output, or the input's gradient, has few tiles")
_IDLE = Choice("unfused", "cuBLAS takes less time where the last wave of tiles leaves multiprocessors idle")
_WIDE = Choice("unfused", "cuBLAS takes less time for float32")
_ODD = Choice("unfused", "cuBLAS takes less time for sizes that are no multiples of 16")
_FEW_DECODED_ROWS = Choice("decode", "one launch takes less time for few rows")
_MORE_DECODED_ROWS = Choice("decode", "one launch takes less time where its tiles keep the multiprocessors busy")
_FEW_OUTPUTS = Choice("triton", "outputs are so few that each tile computes its own panel")
_WHOLE_WAVES = Choice("triton", "the kernels take less time where their tiles keep the multiprocessors busy")
_ASKED_TO_DECODE = Choice("decode", "it was asked for, by use_backend or FUSED_LORA_BACKEND")
INVARIANT = Choice("batch_invariant", "batch_invariant() is in force")


@lru_cache(maxsize=1024)
def choose_linear(
    request: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rows: int,
    *features: int,
) -> Choice:
    """The path of a layer, or its backward, for this many rows and between these numbers of features, on any GPU."""
    choice = choose(request, device, dtype, adapter_dtype)
    if request != "auto" or choice.path != "triton":
        return choice
    if rows < _FEWEST_ROWS:
        return _FEW_ROWS
    if rows * min(features) < _FEWEST_OUTPUTS:
        return _FEW_TILES
    if dtype == torch.float32:
        return _WIDE
    return _ODD if any(size % 16 != 0 for size in features) else choice


@lru_cache(maxsize=1024)
def choose_forward(
    request: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rows: int,
    in_features: int,
    out_features: int,
    *,
    ranks: int,
    drops: bool,
    trains: bool,
) -> Choice:
    """The path of a forward, which draws a mask or not, and keeps something for a backward or not.

    ranks: of all its slices together.
    """
    if request == BATCH_INVARIANT:
        return INVARIANT
    sizes = rows, in_features, out_features
    choice = choose_linear(request, device, dtype, adapter_dtype, *sizes)
    if not _decodes(request, choice, dtype, in_features, out_features):
        return choice
    if request == "decode":
        return _ASKED_TO_DECODE
    if not _measured(device):
        return _FEW_DECODED_ROWS if rows <= _FEW_DECODED else choice
    if drops:
        return _masked_forward(choice, device, *sizes, ranks)
    return _forward(choice, device, dtype, *sizes, ranks, trains)


def _masked_forward(
    choice: Choice, device: torch.device, rows: int, in_features: int, out_features: int, ranks: int
) -> Choice:
    beside_many = out_features >= _HIDING_TIMES * in_features and rows * in_features <= _HIDDEN_MASK
    few_inputs = in_features <= _MOST_DRAWN_FEATURES
    few_outputs = few_inputs and rows <= _FEW_DRAWN_ROWS and rows * out_features <= _FEW_DRAWN_OUTPUTS
    if ranks > _MANY_RANKS:
        few = rows <= _ROWS_OF_MOST_RANKS and in_features <= _MOST_INPUTS_OF_MOST
        few = few and out_features >= _FEWEST_OUTPUTS_OF_MOST
        decodes = ranks <= _MOST_DECODED_RANKS and (few or (beside_many and rows <= _ROWS_OF_MANY_RANKS))
    elif ranks > _DECODED_RANKS:
        hidden = out_features >= _HIDING_OUTPUTS or rows * out_features <= _OUTPUTS_OF_MANY_RANKS
        decodes = beside_many or rows <= _FEW_DECODED or (rows <= _ROWS_OF_MANY_RANKS and hidden)
    elif ranks > _FEW_RANKS:
        decodes = beside_many or rows <= _FEW_DECODED or (rows >= _FEWEST_DIVIDED_ROWS and few_outputs)
    else:
        few_rows = few_inputs and rows <= _DECODED and out_features < _HIDING_TIMES * in_features
        decodes = beside_many or rows <= _FEW_DECODED or few_outputs or few_rows
    if decodes:
        return _FEW_DECODED_ROWS
    # Waves of so few rows were not measured; their tiles would be half empty.
    if rows <= _TOO_FEW_FOR_WAVES:
        return choice
    return _where_full(choice, device, rows, out_features, in_features, _FULL_DRAWN)


def _forward(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    out_features: int,
    ranks: int,
    trains: bool,
) -> Choice:
    from .kernels import decode_tiles, first_wave, own_panel
    from .kernels.config import processors

    sizes = rows, in_features, out_features
    if ranks <= own_panel.MOST_RANKS and own_panel.tile_of(device, dtype, *sizes):
        return _FEW_OUTPUTS
    if rows * out_features >= _FEWEST_OUTPUTS_OF_WAVES and first_wave.first_wave(device, dtype, *sizes, ranks):
        return choice
    if decode_tiles.of_many_ranks(processors(device), rows, out_features, ranks) is not None:
        return _FEW_DECODED_ROWS if rows <= _DECODED else _MORE_DECODED_ROWS
    busy = decode_tiles.kept_busy(device, rows, out_features) >= _BUSY
    if busy and _decodes_ranks(rows, in_features, out_features, ranks):
        if rows <= _DECODED:
            return _FEW_DECODED_ROWS
        most = _MOST_DECODED if rows < _FEWEST_ROWS else max(in_features, out_features)
        alone = rows < _FEWEST_ROWS or (not trains and rows * out_features < _TOO_MUCH_DECODED)
        if alone and out_features >= _FEWEST_DECODED_OUTPUTS and max(in_features, out_features) <= most:
            return _MORE_DECODED_ROWS
    return _where_full(choice, device, rows, out_features, in_features, _FULL)


def _decodes_ranks(rows: int, in_features: int, out_features: int, ranks: int) -> bool:
    """Whether one launch's few programs compute a panel of so many ranks while its tiles are."""
    if ranks <= _DECODED_RANKS:
        return True
    few = rows <= _FEW_DECODED
    if ranks > _MANY_RANKS:
        return few and ranks <= _MOST_DECODED_RANKS and in_features <= _MOST_INPUTS_OF_MOST
    large = rows > _DECODED or ranks * in_features > _LARGEST_DECODED_FACTOR
    many_or_few = out_features >= _HIDING_OUTPUTS or rows * out_features <= _FEWER_OUTPUTS
    return few or rows * ranks <= _SMALL_PANEL or (not large and many_or_few)


@lru_cache(maxsize=1024)
def choose_backward(
    request: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rows: int,
    *features: int,
    plain: bool,
    ranks: int,
) -> Choice:
    """The path of a backward, for dy's rows and columns and x's columns.

    plain: whether dx is wanted, of a layer with one adapter for all outputs; else x's columns may be missing. ranks: of
    all its slices together.
    """
    choice = choose_linear(request, device, dtype, adapter_dtype, rows, *features)
    if not plain or not _decodes(request, choice, dtype, *features):
        return choice
    if request == "decode":
        return _ASKED_TO_DECODE
    if not _measured(device):
        return choice
    most = 0 if ranks > _MOST_DECODED_RANKS else _ROWS_OF_MOST_RANKS if ranks > _MANY_RANKS else _FEW_DECODED
    if rows <= most:
        return _FEW_DECODED_ROWS
    inner, columns = features
    few = rows <= _DECODED_BACK and max(features) <= _DECODED_FEATURES and ranks <= _MANY_RANKS
    if few and (ranks > _FEW_RANKS or inner <= _FEW_INNER):
        return _FEW_DECODED_ROWS
    return _where_full(choice, device, rows, columns, inner, _FULL_ENOUGH if inner <= columns else _FULL)


def _measured(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _where_full(choice: Choice, device: torch.device, rows: int, columns: int, inner: int, full: float) -> Choice:
    """The kernels or cuBLAS for a product [rows, columns] over inner; the choice where it is too small to tell."""
    from .kernels.config import HOPPER, filled

    if rows * min(columns, inner) < _FEWEST_FULL:
        return choice
    tiles = -(-rows // HOPPER.linear.block_m) * -(-columns // HOPPER.linear.block_j)
    return _WHOLE_WAVES if filled(device, tiles) >= full else _IDLE


def _decodes(request: str, choice: Choice, dtype: torch.dtype, *features: int) -> bool:
    """Whether one launch for the most of it can be what takes the least time, or was asked for."""
    if choice.path == "reference" or request not in ("auto", "decode"):
        return False
    return request == "decode" or (dtype.itemsize == 2 and not any(size % 16 for size in features))
