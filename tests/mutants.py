"""Mutation testing: breaks the product on purpose, one mutant at a time, and shows that the tests fail for each.

`make mutants` prints which test killed which mutant and fails if one survived. pytest does not collect this file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
TIMEOUT_SECONDS = 300
SURVIVED, BROKEN = "SURVIVED", "BROKEN"

DROPOUT = "kernels/_dropout.py"
PANEL = "kernels/panel.py"
LINEAR = "kernels/fused_linear.py"
EXTENDED = "kernels/extended.py"
PLACE = "kernels/_place.py"
ADAPTER = "kernels/adapter_grad.py"
REDUCE = "kernels/reduce.py"
REFERENCE = "fused_lora/reference.py"
OPS = "fused_lora/linear_op.py"
SLICES = "kernels/_slices.py"
UPDATE = "kernels/low_rank_update.py"
WEIGHT_OP = "fused_lora/weight_op.py"
EMBEDDING_OP = "fused_lora/embedding_op.py"
MERGE = "fused_lora/merge.py"
CONV = "fused_lora/conv.py"
EMBEDDING = "fused_lora/embedding.py"
STATE = "fused_lora/state.py"
ADAPTER_FILE = "fused_lora/adapter_file.py"
FUNCTIONAL = "fused_lora/functional.py"
TUNING = "fused_lora/tuning.py"
TIMING = "benchmarks/timing.py"
UNFUSED = "fused_lora/unfused.py"
MASKS = "kernels/mask.py"
DECODE = "kernels/decode.py"
DECODE_TILES = "kernels/decode_tiles.py"
DECODE_LAUNCH = "kernels/decode_launch.py"
FEW_ROWS = "kernels/few_rows_grad.py"
TOKENS = "kernels/token_grad.py"
OWN_PANEL = "kernels/own_panel.py"
SPLIT_PANEL = "kernels/split_panel.py"
FIRST_WAVE = "kernels/first_wave.py"
NARROW = "kernels/narrow.py"
REPLAY = "kernels/replay.py"
SPANS = "kernels/spans.py"
LAUNCH = "kernels/launch.py"
BASE = "fused_lora/base.py"
WARM = "fused_lora/warm.py"
FLOPS = "fused_lora/flop_counts.py"
ADAPTER_IO = "fused_lora/adapter_io.py"
FORMATS = "fused_lora/formats.py"
PEFT_CONFIG = "fused_lora/peft_config.py"
MERGE_FILE = "fused_lora/merge_file.py"
STATE_MERGE = "fused_lora/state_merge.py"
OUTSIDE = "fused_lora/adapter.py"
CLI_FILES = "fused_lora/cli_files.py"
WHOLE = "fused_lora/whole.py"
FLAGS = "kernels/flags.py"
FUSED = "fused_lora/fused.py"
RANKS = "kernels/_ranks.py"
REPEAT = "fused_lora/repeat.py"
DISPATCH = "fused_lora/dispatch.py"
LINEAR_CHOICE = "fused_lora/linear_choice.py"
SHARED = "fused_lora/ops.py"
INVARIANT = "fused_lora/invariant.py"
LOOKUP = "kernels/lookup.py"
CONFIG = "kernels/config.py"
SEARCH = "fused_lora/tuning.py"

TRITON = ("tests/test_op.py", "-k", "[triton-float32-float32")
TRITON_OFFSETS = ("tests/test_op.py", "-k", "test_accuracy_with_offsets[triton")
TRITON_STRIDES = ("tests/test_op.py", "-k", "test_accuracy_with_strides[triton")
TORCH = ("tests/test_op.py", "-k", "[reference-float32-float32")
KERNEL_MASKS = ("tests/test_kernels.py", "-k", "mask")
KERNEL_WORDS = ("tests/test_kernels.py", "-k", "words_of_every_width")
HALF_MASKS = ("tests/test_op.py", "-k", "[triton-bfloat16-bfloat16 and 0.1")
UNFUSED_PATH = ("tests/test_op.py", "-k", "[unfused-float32-float32")
UNFUSED_HALF = ("tests/test_op.py", "-k", "many_ranks and unfused")
MANY_RANKS = ("tests/test_op.py", "-k", "many_ranks and triton")
UNFUSED_OFFSETS = ("tests/test_op.py", "-k", "test_accuracy_with_offsets[unfused")
MASK = ("tests/test_reference.py",)
ADDRESSES = ("tests/test_kernels.py", "-k", "test_touches_only_its_arguments")
OPTIONS = ("tests/test_functional.py", "-k", "not bad_input and not any_shape")
MERGED = ("tests/test_merged_linear.py", "-k", "test_accuracy_by_pattern[triton-TFT-")
NARROW_SLICES = ("tests/test_merged_linear.py", "-k", "test_accuracy_by_pattern[triton-TTT-17-float32")
MERGED_RANKS = ("tests/test_merged_linear.py", "-k", "test_accuracy_by_rank[triton")
MERGED_TORCH = ("tests/test_merged_linear.py", "-k", "test_accuracy_by_pattern[reference-TFT-")
LAUNCHES = ("tests/test_merged_linear.py", "-k", "test_launches")
LOOKUPS = ("tests/test_embedding_op.py", "-k", "test_accuracy and triton and float32-float32")
LOOKUPS_TORCH = ("tests/test_embedding.py", "-k", "padding or norm")
CONVOLUTIONS = ("tests/test_conv.py", "tests/test_conv_state.py", "-k", "dropout or definition or load")
PLAIN = ("tests/test_conv_state.py", "-k", "plain_checkpoints")
MERGING = ("tests/test_merging.py", "tests/test_merging_shared.py", "-k", "not thousand and not triton")
ANEW = ("tests/test_merged_inference.py",)
ONE_LAUNCH = ("tests/test_decode.py",)
ONE_LAUNCH_PATH = ("tests/test_decode_path.py", "tests/test_decode_tiles.py", "tests/test_dispatch.py")
BESIDE = ("tests/test_beside.py",)
OVER_RANKS = ("tests/test_extended.py",)
CROSSED = ("tests/test_extended.py", "-k", "cross")
COPIED = ("tests/test_extended.py", "-k", "copied")
LEFT = ("tests/test_extended.py", "-k", "left")
RECORDED = ("tests/test_replay.py",)
WORDS = ("tests/test_flags.py",)
DIRECT = ("tests/test_direct.py",)
FILES = ("tests/test_adapter_file.py",)
REPEATED = ("tests/test_replay.py", "-k", "kind")
CALLS_REPEATED = ("tests/test_replay.py", "-k", "when_calls or another_gpu")
ROUNDED = ("tests/test_narrow.py",)
FIRST_OF_WAVES = ("tests/test_first_wave.py",)
WITH_PANEL = ("tests/test_own_panel.py",)
PANEL_ADDRESSES = ("tests/test_split_panel.py", "-k", "address")
UNMASKED = ("tests/test_split_panel.py", "-k", "not mask and (not against_float64 or 50)")
DRAWN = ("tests/test_split_panel.py", "-k", "mask and (33 or 50 or tile or alone or draws)")
KNOWN = ("tests/test_known.py",)
COUNTED = ("tests/test_summary.py", "-k", "counter")
WARMUP = ("tests/test_warmup.py",)
LAYOUTS = ("tests/test_functional.py", "-k", "layout")
LOADED = ("tests/test_merged_state_dict.py",)
BAD = (
    *("tests/test_linear.py", "tests/test_merged_linear.py", "tests/test_embedding.py", "tests/test_functional.py"),
    *("-k", "bad or numpys or enables or from_pretrained or no_gradient"),
)
IO = ("tests/test_adapter_io.py",)
SPELT = ("tests/test_formats.py",)
COMMANDS = ("tests/test_cli_merge.py",)
MODEL_FILES = ("tests/test_merge_file.py",)
SUMS = ("tests/test_state_merge.py",)
WRITERS = ("tests/test_whole.py",)
BATCHES = ("tests/test_direct.py", "-k", "batch")
CHOICE = ("tests/test_dispatch.py",)
TABLES = ("tests/test_tiles.py",)
TRIALS = ("tests/test_tuning.py", "-k", "gain or wrong_results")
TURNS = ("tests/test_benchmarks.py", "-k", "turns")
MASKED_TRIALS = ("tests/test_tuning.py", "-k", "for_masks and True")
KEYS = ("tests/test_launch_keys.py",)
AGAIN = ("tests/test_repeat.py",)
FEW = ("tests/test_few_rows_grad.py",)
OF_TOKENS = ("tests/test_token_grad.py",)
CHECKPOINTS = ("tests/test_checkpoints.py", "tests/test_adapter_file.py")


class BrokenRun(Exception):
    """The run says nothing about the tests: a mutant no longer applies, or pytest did not get to an assertion."""


@dataclass(frozen=True)
class Mutant:
    """One edit of one file, and the pytest arguments that select the tests which must notice it."""

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    def mutated(self, root: Path) -> str:
        source = (root / self.path).read_text()
        occurrences = source.count(self.before)
        if occurrences != 1:
            raise BrokenRun(f"{self.name}: {self.before!r} occurs {occurrences} times in {self.path}; expected once.")
        return source.replace(self.before, self.after)


MUTANTS = (
    Mutant("dx followed unsaid", FUSED, "followed=beside)", "followed=False)", BESIDE),
    Mutant(
        "memory that came while it is read",
        FUSED,
        "grads = adapter_grad.prepared_grads(dy, later_xa, dyb, x, bits, dtype, enable_lora, beside=beside)",
        "grads = lambda: adapter_grad.prepared_grads(dy, later_xa, dyb, x, bits, dtype, enable_lora, beside=beside)()",
        BESIDE,
    ),
    Mutant("beside an empty dx", FUSED, " and dy.numel() * weight.numel() > 0", "", BESIDE),
    Mutant("db alone not beside dx", FUSED, "not (x is None and later_xa is None)", "x is not None", BESIDE),
    Mutant("lora_B rounded in lora_A's blocks", NARROW, "block - A_blocks, B_ROWS", "block, B_ROWS", ROUNDED),
    Mutant("rounded rows too near", NARROW, "stride_aor=A_out.stride(0)", "stride_aor=lora_A.shape[1]", ROUNDED),
    Mutant("rounded across its strides", NARROW, 'strides("ar ak", lora_A)', 'strides("ak ar", lora_A)', ROUNDED),
    Mutant("empty adapters rounded", FUSED, " or min(lora_A.numel(), lora_B.numel()) == 0", "", ROUNDED),
    Mutant("rounded for whoever converts", FUSED, " if reads else (lora_A, lora_B)", "", ROUNDED),
    Mutant(
        "a launch that no recorder sees",
        LAUNCH,
        "        thread.recorder.repeatable = False\n    if descriptors",
        "        pass\n    if descriptors",
        RECORDED,
    ),
    Mutant("repeated in spite of torch's operations", REPLAY, "elif not func.is_view", "elif False", RECORDED),
    Mutant("one of two tensors at an address", REPLAY, "not overlap(given)", "True", RECORDED),
    Mutant("tensors as long as their rows", SPANS, "(size - 1) * stride", "stride", RECORDED),
    Mutant("a conversion that is not repeated", REPLAY, "    torch.ops.aten.to.dtype: Tensor.to,\n", "", RECORDED),
    Mutant("repeated while Triton instruments", REPLAY, "(instrumentation(), *kinds)", "tuple(kinds)", RECORDED),
    Mutant(
        "launched while Triton instruments", LAUNCH, "facts, instrumentation()]", "facts]", ("tests/test_launch.py",)
    ),
    Mutant("called while Triton instruments", REPEAT, "*flags, instrumentation(),", "*flags,", AGAIN),
    Mutant(
        "merged while Triton instruments",
        REPEAT,
        "scaling, backend, instrumentation(),",
        "scaling, backend,",
        AGAIN,
    ),
    Mutant(
        "words for two threads",
        FLAGS,
        "        with self.giving:\n            first",
        "        if True:\n            first",
        WORDS,
    ),
    Mutant(
        "two words for a stream",
        FLAGS,
        "            words = self.of_stream.get(stream)\n            if",
        "            if",
        WORDS,
    ),
    Mutant("words of a graph", FLAGS, "executor.submit(make).result()", "make()", WORDS),
    Mutant(
        "memory of unknown origin",
        REPLAY,
        "            self.repeatable = False\n            return",
        "            return",
        RECORDED,
    ),
    Mutant("pointers without their offset", REPLAY, "values[at.value] + at.offset", "values[at.value]", RECORDED),
    Mutant(
        "a view as what it is of", REPLAY, "whole = at.offset == 0 and kind == _kind(tensor)", "whole = True", RECORDED
    ),
    Mutant("a view at the storage's start", REPLAY, "value.storage_offset() + self.offset", "self.offset", RECORDED),
    Mutant("numbers read as others", REPLAY, "if tensor.dtype != kind[0]:", "if False:", RECORDED),
    Mutant("made ready for any stream", REPLAY, "key = (self, stream, *pointers)", "key = (self, *pointers)", RECORDED),
    Mutant(
        "made ready for any addresses", REPLAY, "(self, stream, *pointers)", "(self, stream, *pointers[1:])", RECORDED
    ),
    Mutant("made ready for ever", REPLAY, "len(_ready) > _MOST_READY", "False", RECORDED),
    Mutant(
        "made ready for a launcher that allocates",
        LAUNCH,
        " or run.profile_scratch_size",
        "",
        ("tests/test_launch.py",),
    ),
    Mutant("recorded whatever computes it", SHARED, "if choice.path not in _REPEATED:", "if False:", RECORDED),
    Mutant(
        "a forward's kind without its scaling", OPS, "inference, scaling, threshold", "inference, threshold", REPEATED
    ),
    Mutant(
        "a forward's kind without its mask", OPS, "threshold, row_offset, column_offset, *", "threshold, *", REPEATED
    ),
    Mutant(
        "a forward's kind whether it trains", OPS, "choice.path, inference, scaling", "choice.path, scaling", REPEATED
    ),
    Mutant("a seed in its first place", OPS, "lora_A, lora_B, seed), facts", "lora_A, lora_B), facts", REPEATED),
    Mutant(
        "a backward's kind without its scaling",
        OPS,
        '"backward", choice.path, scaling, dtype',
        '"backward", choice.path, dtype',
        REPEATED,
    ),
    Mutant(
        "a backward's kind without its dtype",
        OPS,
        '"backward", choice.path, scaling, dtype',
        '"backward", choice.path, scaling',
        REPEATED,
    ),
    Mutant(
        "panels of any size in one launch",
        LINEAR_CHOICE,
        "* in_features > _LARGEST",
        "* in_features < _LARGEST",
        CHOICE,
    ),
    Mutant("more rows of any ranks in one launch", LINEAR_CHOICE, "large = rows > _DECODED or", "large =", CHOICE),
    Mutant("any last wave", LINEAR_CHOICE, ">= full else", ">= 0 else", CHOICE),
    Mutant("whole waves of any size", LINEAR_CHOICE, "rows * min(columns, inner) < _FEWEST_FULL", "False", CHOICE),
    Mutant(
        "as full for a short contraction", LINEAR_CHOICE, "_FULL_ENOUGH if inner <= columns else _FULL", "_FULL", CHOICE
    ),
    Mutant(
        "as full for a long contraction",
        LINEAR_CHOICE,
        "_FULL_ENOUGH if inner <= columns else _FULL",
        "_FULL_ENOUGH",
        CHOICE,
    ),
    Mutant(
        "masks of many ranks in one launch",
        LINEAR_CHOICE,
        "    elif ranks > _DECODED_RANKS:\n",
        "    elif False:\n",
        CHOICE,
    ),
    Mutant(
        "masks of any rows for few outputs",
        LINEAR_CHOICE,
        "few_outputs = few_inputs and rows <= _FEW_DRAWN_ROWS and",
        "few_outputs = few_inputs and",
        CHOICE,
    ),
    Mutant(
        "masks of few rows and many features",
        LINEAR_CHOICE,
        "few_inputs = in_features <= _MOST_DRAWN_FEATURES",
        "few_inputs = True",
        CHOICE,
    ),
    Mutant("masks of hundreds of ranks", LINEAR_CHOICE, "ranks <= _MOST_DECODED_RANKS and (few", "(few", CHOICE),
    Mutant("masks beside outputs of any size", LINEAR_CHOICE, "and rows * in_features <= _HIDDEN_MASK", "", CHOICE),
    Mutant(
        "masks of many rows and outputs", LINEAR_CHOICE, "and out_features < _HIDING_TIMES * in_features", "", CHOICE
    ),
    Mutant(
        "masks of few divided rows",
        LINEAR_CHOICE,
        "(rows >= _FEWEST_DIVIDED_ROWS and few_outputs)",
        "few_outputs",
        CHOICE,
    ),
    Mutant("waves of few rows with a mask", LINEAR_CHOICE, "rows <= _TOO_FEW_FOR_WAVES", "False", CHOICE),
    Mutant(
        "waves with a mask as full as without",
        LINEAR_CHOICE,
        "in_features, _FULL_DRAWN)",
        "in_features, _FULL)",
        CHOICE,
    ),
    Mutant("a panel kept from more rows", LINEAR_CHOICE, "rows < _FEWEST_ROWS or (not trains", "(not trains", CHOICE),
    Mutant("a panel kept from all rows", LINEAR_CHOICE, "(not trains and rows *", "(rows *", CHOICE),
    Mutant(
        "one launch kept from few rows",
        LINEAR_CHOICE,
        "    if busy and _decodes_ranks(",
        "    if busy and rows > _DECODED and _decodes_ranks(",
        ONE_LAUNCH_PATH,
    ),
    Mutant(
        "masks drawn by as many programs", DECODE_TILES, "tile.parts * outputs >= HIDDEN_PARTS", "True", ONE_LAUNCH_PATH
    ),
    Mutant(
        "masks of few rows drawn by many",
        DECODE_TILES,
        "tile if rows < FEWEST_DRAWN_ROWS else drawing",
        "drawing",
        ONE_LAUNCH_PATH,
    ),
    Mutant(
        "stages as without splits",
        DECODE_TILES,
        "cdiv(inputs, tile.block_k), tile.splits",
        "inputs, tile.block_k",
        ONE_LAUNCH_PATH,
    ),
    Mutant(
        "parts of a mask that are empty",
        DECODE_TILES,
        "min(DRAWING_PROGRAMS // panels, inputs // tile.panel_k)",
        "DRAWING_PROGRAMS // panels",
        ONE_LAUNCH_PATH,
    ),
    Mutant("one piece of many parts", DECODE, "start_r + tl.arange(0, SUM_R)", "tl.arange(0, SUM_R)", ONE_LAUNCH),
    Mutant(
        "xa of many ranks unscaled",
        FUSED,
        "undrawn_panel(x, lora_A.t(), scaling)",
        "undrawn_panel(x, lora_A.t(), 1.02 * scaling)",
        MANY_RANKS,
    ),
    Mutant("a panel of a mask drawn alone unscaled", FUSED, "scale / dropout.keep_probability", "scale", DRAWN),
    Mutant("a panel without a mask drawn alone", FUSED, "undrawn_panel(dropped,", "undrawn_panel(left,", DRAWN),
    Mutant("masks within a byte", SPLIT_PANEL, "dropout.column_offset % 8 != 0 or", "", DRAWN),
    Mutant("masks of any ranks", SPLIT_PANEL, " or factor.shape[1] > _MOST_DRAWN_RANKS", "", DRAWN),
    Mutant("a mask's panel unscaled", SPLIT_PANEL, "scale /= dropout.keep_probability", "pass", DRAWN),
    Mutant("a panel without its mask", SPLIT_PANEL, "left = kept(keep, left)", "pass", DRAWN),
    Mutant("a mask without its rows' offset", SPLIT_PANEL, "rows + row_offset, first", "rows, first", DRAWN),
    Mutant("a mask without its columns' offset", SPLIT_PANEL, " + column_offset + start", " + start", DRAWN),
    Mutant(
        "a mask's columns by part", SPLIT_PANEL, "+ column_offset + start", "+ column_offset + start - first", DRAWN
    ),
    Mutant(
        "bits past the last row",
        SPLIT_PANEL,
        "tl.minimum(M - first_row, BLOCK_M)",
        "tl.minimum(M, BLOCK_M)",
        PANEL_ADDRESSES,
    ),
    Mutant(
        "bits past the last column",
        SPLIT_PANEL,
        "stored[:, None] & in_columns[None, :]",
        "stored[:, None]",
        PANEL_ADDRESSES,
    ),
    Mutant(
        "a mask's parts without a step",
        SPLIT_PANEL,
        ", cdiv(I, tile.block_i))\n    return tile",
        ", 16)\n    return tile",
        DRAWN,
    ),
    Mutant(
        "a mask's tile of many rows for all",
        SPLIT_PANEL,
        "and 2 * cdiv(M, tile.block_m) > processors(device)",
        "",
        DRAWN,
    ),
    Mutant("a mask's large programs as many", SPLIT_PANEL, "else (2, 8)", "else (4, 16)", DRAWN),
    Mutant("a forward's mask drawn alone", FUSED, " or _regular(x, dropout)", "", DRAWN),
    Mutant(
        "an unfused masked panel unscaled",
        UNFUSED,
        "lora_A.t(), scaling, dropout)",
        "lora_A.t(), 1.02 * scaling, dropout)",
        UNFUSED_HALF,
    ),
    Mutant(
        "dyb of many ranks unscaled", FUSED, "(dy, lora_B, scaling, xa)", "(dy, lora_B, 1.02 * scaling, xa)", MANY_RANKS
    ),
    Mutant("few rows without their mask", FUSED, "x, xa, bits, dtype)", "x, xa, None, dtype)", MANY_RANKS),
    Mutant("any rows in one launch", FUSED, "dyb_alone and len(dy) <= scaled(", "dyb_alone and 0 <= scaled(", BESIDE),
    Mutant(
        "masked gradients in runs of any rows",
        ADAPTER,
        "most = max(most, cdiv(M, scaled(",
        "max(most, cdiv(M, scaled(",
        BESIDE,
    ),
    Mutant("masked gradients of any ranks in short runs", ADAPTER, " and R <= FEW_MASKED_RANKS", "", BESIDE),
    Mutant("a wide tile for few columns", ADAPTER, " and columns >= FEWEST_WIDE_COLUMNS", "", BESIDE),
    Mutant("a wide tile for more ranks", ADAPTER, " and ranks <= MOST_WIDE_RANKS", "", BESIDE),
    Mutant("a wide tile in spite of a table", ADAPTER, "if tiles is HOPPER and columns", "if columns", BESIDE),
    Mutant("few masked rows divided", ADAPTER, "        most = 1\n", "        pass\n", BESIDE),
    Mutant("few unfused rows without their mask", UNFUSED, "x, xa, bits, dtype)", "x, xa, None, dtype)", UNFUSED_HALF),
    Mutant(
        "few unfused rows unscaled",
        UNFUSED,
        "dx, dyb = None, undrawn_panel(dy, lora_B, scaling, xa)",
        "dx, dyb = None, undrawn_panel(dy, lora_B, 1.02 * scaling, xa)",
        UNFUSED_HALF,
    ),
    Mutant(
        "few unfused rows of dx without a mask",
        UNFUSED,
        "add_kept_(dx, dyb, lora_A, bits, None)",
        "add_kept_(dx.addmm_(dyb, in_dtype(lora_A, dy.dtype)), 0 * dyb, lora_A, bits, None)",
        UNFUSED_HALF,
    ),
    Mutant("repeated with other numbers", REPLAY, "key = (facts, *kinds_of(given))", "key = kinds_of(given)", RECORDED),
    Mutant("repeated at any alignment", REPLAY, ", t.data_ptr() % 16) for", ") for", RECORDED),
    Mutant("repeated for other shapes", REPLAY, "t.shape, t.stride(), t.get", "t.stride(), t.get", RECORDED),
    Mutant("memory that is never given back", REPLAY, "self.events.append(_Release(value))", "pass", RECORDED),
    Mutant("recorded for ever", REPLAY, "len(_programs) > _MOST_PROGRAMS", "False", RECORDED),
    Mutant("too few words to count in", REPLAY, "_Flags(count))", "_Flags(1))", RECORDED),
    Mutant("overlapping on any new GPU", CONFIG, "in (90, 100)", ">= 90", BESIDE),
    Mutant("beside what nobody waits for", ADAPTER, "            gdc_wait()", "            pass", BESIDE),
    Mutant(
        "all programs wait",
        ADAPTER,
        "if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == last",
        "if last >= 0",
        BESIDE,
    ),
    Mutant("a launch not told to begin early", ADAPTER, "launch_pdl=beside", "launch_pdl=False", BESIDE),
    Mutant(
        "one key for launches alone and beside",
        ADAPTER,
        "transposed, beside, followed, grad.dtype",
        "transposed, grad.dtype",
        KEYS,
    ),
    Mutant("one key for dx alone and followed", EXTENDED, "first_tile, followed, input", "first_tile, input", KEYS),
    Mutant("one key for sums alone and beside", REDUCE, "dtype, beside, None", "dtype, None", KEYS),
    Mutant("a sum that waits for nothing", REDUCE, "        gdc_wait()", "        pass", BESIDE),
    Mutant("a sum not told to begin early", REDUCE, "launch_pdl=beside", "launch_pdl=False", BESIDE),
    Mutant("a sum let in by nobody", ADAPTER, "followed=overlaps\n", "followed=False\n", BESIDE),
    Mutant("da summed for db", ADAPTER, "1.0, (partial_db, dtype)", "1.0, (partial_da, dtype)", BESIDE),
    Mutant("ranks past the first step", EXTENDED, "rank_steps = cdiv(R, tile.block_i)", "rank_steps = 1", OVER_RANKS),
    Mutant(
        "a mask on more than the ranks", EXTENDED, "if step == RANK_STEPS - 1:", "if step == RANK_STEPS:", OVER_RANKS
    ),
    Mutant("a tile under another's mask", EXTENDED, "tile + programs, bits_ptr", "tile, bits_ptr", OVER_RANKS),
    Mutant(
        "a tile that goes on from the one before",
        EXTENDED,
        "                acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)\n        else:",
        "        else:",
        OVER_RANKS,
    ),
    Mutant(
        "a program's first tile only", EXTENDED, "tl.cdiv(tiles - first_tile, programs) * STEPS", "STEPS", OVER_RANKS
    ),
    Mutant("ranks of a slice without", EXTENDED, "(ENABLED >> of_tile) % 2 == 0", "R < 0", OVER_RANKS),
    Mutant("lora_B of the slice's place", EXTENDED, "column += (slice - of_tile) * WIDTH", "column += 0", OVER_RANKS),
    Mutant("a GEMM without bias", EXTENDED, "if bias_ptr is not None:", "if False:", OVER_RANKS),
    Mutant("pieces in one place", EXTENDED, "first_column + COLUMNS // 2, J", "first_column, J", OVER_RANKS),
    Mutant("another dtype read as it lies", EXTENDED, "operand.dtype == like.dtype and ", "", COPIED),
    Mutant("rows read at any address", EXTENDED, " and all(map(describable, matrices))", "", COPIED),
    Mutant("slices that tiles cross", EXTENDED, "slices % tile.block_j == 0", "slices > 0", LEFT),
    Mutant("slices apart by any rank", EXTENDED, "[operand[0], operand[:, 0]]", "[operand[:, 0]]", COPIED),
    Mutant("a mask without registers", EXTENDED, "(bits is None or tile.extends_masked)", "True", LEFT),
    Mutant("first wave without room", FIRST_WAVE, "<= -tiles % processors", "<= processors", FIRST_OF_WAVES),
    Mutant("first wave of any rows", FIRST_WAVE, "rows % tile.block_m == 0 and ", "", FIRST_OF_WAVES),
    Mutant("first wave of any ranks", FIRST_WAVE, "ranks % RANK_STEP != 0", "False", FIRST_OF_WAVES),
    Mutant("first wave of any strides", FIRST_WAVE, "or not describable(weight)", "", FIRST_OF_WAVES),
    Mutant(
        "a tile after the first wave left out", FIRST_WAVE, "y, other, first)", "y, other, first + 1)", FIRST_OF_WAVES
    ),
    Mutant("first wave in another order", DECODE_LAUNCH, "GROUP_M if first else ", "", FIRST_OF_WAVES),
    Mutant(
        "flags of a first wave left",
        DECODE,
        "tiles_m * tiles_n if first_tiles is None else first_tiles",
        "tiles_m * tiles_n",
        FIRST_OF_WAVES,
    ),
    Mutant(
        "one launch for whole waves", LINEAR_CHOICE, "rows * out_features >= _FEWEST_OUTPUTS_OF_WAVES", "False", CHOICE
    ),
    Mutant(
        "whole waves for few rows", LINEAR_CHOICE, "rows * out_features >= _FEWEST_OUTPUTS_OF_WAVES and ", "", CHOICE
    ),
    Mutant("tiles with a panel without the scale", OWN_PANEL, "(sums * scale)", "sums", WITH_PANEL),
    Mutant("tiles without their panel", OWN_PANEL, "quarters[quarter] + update", "quarters[quarter]", WITH_PANEL),
    Mutant("tiles with a panel keep another's panel", OWN_PANEL, "if tile_n == 0:", "if tile_m == 0:", WITH_PANEL),
    Mutant("tiles with a panel without bias", OWN_PANEL, "if bias_ptr is not None:", "if False:", WITH_PANEL),
    Mutant("tiles with a panel of one slice", OWN_PANEL, "own_ranks = ranks - e * R", "own_ranks = ranks", WITH_PANEL),
    Mutant("tiles with a panel past their slice", OWN_PANEL, " & in_slice[None, :]", "", WITH_PANEL),
    Mutant("tiles with a panel of any strides", OWN_PANEL, "and describable(x)", "and True", WITH_PANEL),
    Mutant("tiles with a panel for any ranks", LINEAR_CHOICE, "ranks <= own_panel.MOST_RANKS", "True", CHOICE),
    Mutant("another quarter's factor ahead", OWN_PANEL, "ahead[2 * half + quarter]", "ahead[quarter]", WITH_PANEL),
    Mutant(
        "factors ahead past the ranks",
        OWN_PANEL,
        "(ranks < R)[:, None] & (columns < N)",
        "(ranks >= 0)[:, None] & (columns < N)",
        WITH_PANEL,
    ),
    Mutant("tiles with a panel for any size", OWN_PANEL, " or outputs > MOST_OUTPUTS", "", WITH_PANEL),
    Mutant("one launch for any last wave", LINEAR_CHOICE, ">= _BUSY", ">= 0", CHOICE),
    Mutant("one launch for any size", LINEAR_CHOICE, "rows * out_features < _TOO_MUCH_DECODED", "True", CHOICE),
    Mutant("panels 2 % too large", PANEL, "(acc * scale).to", "(acc * scale * 1.02).to", TRITON),
    Mutant(
        "dyb 2 % too large",
        ADAPTER,
        "reduce(dyb, dy.dtype, scaling,",
        "reduce(dyb, dy.dtype, scaling * 1.02,",
        TRITON,
    ),
    Mutant("xa 2 % too large", REFERENCE, "scaling * inverse_q)", "1.02 * scaling * inverse_q)", TORCH),
    Mutant(
        "dyb 2 % too large",
        REFERENCE,
        "product(piece, factor, scaling)",
        "product(piece, factor, 1.02 * scaling)",
        TORCH,
    ),
    Mutant(
        "no LoRA term in dx",
        LINEAR,
        "_fused_linear(dy, weight, dyb, lora_A, None, bits, ",
        "_fused_linear(dy, weight, 0 * dyb, lora_A, None, bits, ",
        TRITON,
    ),
    Mutant(
        "no LoRA term in dx without dropout",
        REFERENCE,
        "torch.addmm(dy @ weight, dyb, lora_A.to(dy.dtype))",
        "dy @ weight",
        TORCH,
    ),
    Mutant(
        "no LoRA term in dx with dropout",
        REFERENCE,
        "dy @ weight + _kept(dyb @ lora_A.to(dy.dtype), bits)",
        "dy @ weight",
        TORCH,
    ),
    Mutant(
        "no 1/q in xa",
        PANEL,
        "scale /= dropout.keep_probability",
        "pass",
        TRITON,
    ),
    Mutant("no 1/q in dyb", OPS, "scaling /= 1 - dropout_threshold(dropout_p) / 65536", "pass", TORCH),
    Mutant("no mask in dx", LINEAR, "tl.where(unpacked_in_pairs(words, BLOCK_M, BLOCK_J), acc, 0.0)", "acc", TRITON),
    Mutant("da under the last step's bits", ADAPTER, "_bits_of(start + BLOCK_M", "_bits_of(start", TRITON),
    Mutant("no mask in da", ADAPTER, "dyb, None, bits, tile", "dyb, None, None, tile", TRITON),
    Mutant("no mask in dx", REFERENCE, "_kept(dyb @ lora_A.to(dy.dtype), bits)", "dyb @ lora_A.to(dy.dtype)", TORCH),
    Mutant("da under the last step's bits", ADAPTER, "_bits_of(start + BLOCK_M", "_bits_of(start", TRITON),
    Mutant("no mask in da", REFERENCE, "_kept(x, bits).to(dtype)", "x.to(dtype)", TORCH),
    Mutant("no 1/q in xa", REFERENCE, "scaling * inverse_q)", "scaling)", TORCH),
    Mutant(
        "da halved",
        ADAPTER,
        "return reduce(partials, dtype, beside=beside)[0]",
        "return reduce(partials, dtype, 0.5)[0]",
        TRITON,
    ),
    Mutant("da halved", REFERENCE, "return dyb.T.to(dtype) @", "return 0.5 * dyb.T.to(dtype) @", TORCH),
    Mutant("dB 2 % too large", REDUCE, "other_out_ptr, 1.0,", "other_out_ptr, 1.02,", TRITON),
    Mutant("db of unscaled xa", REFERENCE, "panels = xa.to(dtype)", "panels = (xa.to(dtype) / scaling)", TORCH),
    Mutant("mask one row off", DROPOUT, "(seed, rows[:, None],", "(seed, rows[:, None] + 1,", TRITON),
    Mutant(
        "mask one block off, aligned",
        DROPOUT,
        "(seed, threshold, rows, blocks)\n    bits",
        "(seed, threshold, rows, blocks + 1)\n    bits",
        TRITON,
    ),
    Mutant("mask one block off, unaligned", DROPOUT, "rows, blocks + 1)", "rows, blocks + 2)", TRITON_OFFSETS),
    Mutant(
        "threshold itself dropped, in low halves",
        DROPOUT,
        "(threshold & 0x7FFF7FFF)",
        "(threshold & 0x7FFF7FFF) - 1",
        KERNEL_MASKS,
    ),
    Mutant(
        "threshold itself dropped, in high halves",
        DROPOUT,
        "(threshold & 0x7FFF7FFF)",
        "(threshold & 0x7FFF7FFF) - (1 << 16)",
        KERNEL_MASKS,
    ),
    Mutant("a half borrows from the other", DROPOUT, "word | 0x80008000", "word | 0x80000000", KERNEL_MASKS),
    Mutant("halves of words swapped, aligned", DROPOUT, "lane % 2 * 16", "16 - lane % 2 * 16", TRITON),
    Mutant("words swapped in the bits", DROPOUT, "pair2) * 4 + pair1", "pair1) * 4 + pair2", TRITON),
    Mutant(
        "bits read in another order",
        DROPOUT,
        "[:, :, None] >> tl.arange(0, 8)",
        "[:, :, None] >> 7 - tl.arange(0, 8)",
        TRITON,
    ),
    Mutant("pairs read in another order", DROPOUT, "pairs >> 2, pairs >> 4", "pairs >> 4, pairs >> 2", HALF_MASKS),
    Mutant("bits saved in another order", REFERENCE, "_BITS = (1, 2, 4", "_BITS = (2, 1, 4", KERNEL_MASKS),
    Mutant("bits of a tile's columns mixed up", DROPOUT, "* 8 + lanes % 2", "* 8 + 1 - lanes % 2", HALF_MASKS),
    Mutant(
        "a word's bytes in another order",
        DROPOUT,
        "[None, None, :, None] * 8",
        "[None, None, :, None] * 0",
        KERNEL_WORDS,
    ),
    Mutant("words that cross a row's edge", DROPOUT, "aligned and width", "width", ADDRESSES),
    Mutant("blocks joined where they are not cut", DROPOUT, "<< (8 - shift)", "<< (7 - shift)", TRITON_OFFSETS),
    Mutant(
        "row's high bits ignored", DROPOUT, "(rows >> 32).to(tl.uint32)", "(rows * 0).to(tl.uint32)", TRITON_OFFSETS
    ),
    Mutant(
        "seed's high bits ignored", DROPOUT, "seed.to(tl.uint64)", "(seed & 0xFFFFFFFF).to(tl.uint64)", KERNEL_MASKS
    ),
    Mutant("seed by address", PANEL, "tl.load(seed_ptr)", "seed_ptr.to(tl.int64)", TRITON),
    Mutant("ten rounds of Philox", DROPOUT, "static_range(7)", "static_range(10)", TRITON),
    Mutant(
        "mask one row off",
        REFERENCE,
        "(self.row_offset + start, self.row_offset + stop,",
        "(self.row_offset + start + 1, self.row_offset + stop + 1,",
        MASK,
    ),
    Mutant("mask one block off", REFERENCE, "philox(seed, (block, row", "philox(seed, (block + 1, row", MASK),
    Mutant("threshold itself dropped", REFERENCE, ">= self.threshold", "> self.threshold", MASK),
    Mutant("halves of words swapped", REFERENCE, "(word & 0xFFFF, word >> 16)", "(word >> 16, word & 0xFFFF)", MASK),
    Mutant("row's high bits ignored", REFERENCE, "(row >> 32) & _WORD", "torch.zeros_like(row)", MASK),
    Mutant("seed's high bits ignored", REFERENCE, "(seed >> 32) & _WORD", "torch.zeros_like(seed)", MASK),
    Mutant(
        "seed by address", REFERENCE, "_lanes(self.seed, row", "_lanes(torch.tensor(self.seed.data_ptr()), row", MASK
    ),
    Mutant("q in 65535ths", REFERENCE, "1 - self.threshold / 65536", "1 - self.threshold / 65535", OPTIONS),
    Mutant("xa's mask without row offset", PANEL, "rows + row_offset", "rows", TRITON_OFFSETS),
    Mutant("xa's mask without column offset", PANEL, "+ column_offset\n", "+ 0 * column_offset\n", TRITON_OFFSETS),
    Mutant(
        "da's mask of other columns",
        ADAPTER,
        "bit_ptrs(bits_ptr, stride_bm, start + local, first_inner",
        "bit_ptrs(bits_ptr, stride_bm, start + local, 0 * first_inner",
        TRITON,
    ),
    Mutant("a mask's kernel without row offset", MASKS, "rows + row_offset", "rows", UNFUSED_OFFSETS),
    Mutant(
        "unfused dx without its mask",
        UNFUSED,
        "mask.add_kept_(dx, dyb, lora_A, bits, x)",
        "mask.add_kept_(dx.addmm_(dyb, lora_A), 0 * dyb, lora_A, bits, x)",
        UNFUSED_PATH,
    ),
    Mutant(
        "unfused da without its mask",
        UNFUSED,
        "product(dyb.t(), kept, dtype)",
        "product(dyb.t(), x, dtype)",
        UNFUSED_PATH,
    ),
    Mutant("unfused scaling forgotten", UNFUSED, "lora_A.t(), scaling)", "lora_A.t(), 1.0)", UNFUSED_PATH),
    Mutant(
        "backward with another layer's mask",
        OPS,
        "bits if wants_dyb and drops else None",
        "~bits if wants_dyb and drops else None",
        TRITON,
    ),
    Mutant(
        "every layer with the same mask",
        FUNCTIONAL,
        "torch.randint(0, 2**63 - 1, (1,), device=device)",
        "torch.zeros(1, dtype=torch.int64, device=device)",
        OPTIONS,
    ),
    Mutant("rank tail read on both sides", RANKS, "tl.where(e < last, R, 0)", "R + BLOCK_R", TRITON),
    Mutant("rank tail of the panel read", RANKS, " & in_ranks[None, :]", "", ADDRESSES),
    Mutant("rank tail of the factor read", RANKS, "in_ranks[:, None] & ", "", ADDRESSES),
    Mutant("last ranks skipped", LINEAR, "SLICE_STEPS * RANK_STEPS)", "SLICE_STEPS * RANK_STEPS - 1)", TRITON),
    Mutant(
        "rank tail of the factor read",
        PANEL,
        "(inner[:, None] < I) & (ranks[None, :] < R)",
        "inner[:, None] < I",
        ADDRESSES,
    ),
    Mutant("rank tail stored", PANEL, "(rows[:, None] < M) & (ranks[None, :] < R)", "rows[:, None] < M", ADDRESSES),
    Mutant(
        "rank tail read and stored",
        ADAPTER,
        "in_ranks = ranks[None, :] < R",
        "in_ranks = ranks[None, :] >= 0",
        ADDRESSES,
    ),
    Mutant("rows past M read", PANEL, "tl.minimum(rows, M - 1)", "rows", ADDRESSES),
    Mutant(
        "last tile of K skipped, by descriptor",
        LINEAR,
        "range(0, I, BLOCK_I):\n            left = left_ptr",
        "range(0, I - BLOCK_I, BLOCK_I):\n            left = left_ptr",
        CROSSED,
    ),
    Mutant(
        "last step of K skipped", EXTENDED, "STEPS=cdiv(I, tile.block_i) +", "STEPS=I // tile.block_i +", OVER_RANKS
    ),
    Mutant(
        "last tile of K skipped, by pointer",
        LINEAR,
        "range(0, I, BLOCK_I):\n            if EVEN_I",
        "range(0, I - BLOCK_I, BLOCK_I):\n            if EVEN_I",
        TRITON,
    ),
    Mutant("last tile of K skipped", PANEL, "range(0, I, BLOCK_I)", "range(0, I - BLOCK_I, BLOCK_I)", TRITON),
    Mutant("columns past K read", PANEL, ", mask=inner[None, :] < I, other=0.0", "", TRITON_STRIDES),
    Mutant(
        "quarters of a tile mixed up",
        LINEAR,
        "half * HALF + quarter * QUARTER",
        "half * QUARTER + quarter * HALF",
        TRITON,
    ),
    Mutant(
        "only the first group of tiles",
        PLACE,
        "group * GROUP_M + in_group % group_size",
        "in_group % group_size",
        TRITON,
    ),
    Mutant(
        "last rows of a split dropped",
        ADAPTER,
        "tl.minimum(first + ROWS, M), BLOCK_M",
        "tl.minimum(first + ROWS, M) - BLOCK_M, BLOCK_M",
        TRITON,
    ),
    Mutant(
        "last split dropped",
        ADAPTER,
        "splits = cdiv(M, rows)",
        "splits = max(1, cdiv(M, rows) - 1)",
        TRITON,
    ),
    Mutant("last split not added", REDUCE, "splits < SPLITS", "splits < SPLITS - 1", TRITON),
    Mutant("no bias", LINEAR, "if bias_ptr is not None:", "if False:", TRITON),
    Mutant("no bias", REFERENCE, "linear(x, weight, bias)", "linear(x, weight, None)", TORCH),
    Mutant(
        "fan_in_fan_out reshapes",
        FUNCTIONAL,
        "weight = weight.T",
        "weight = weight.reshape(weight.shape[::-1])",
        OPTIONS,
    ),
    Mutant("dropout outside training", FUNCTIONAL, "if not training:", "if False:", OPTIONS),
    Mutant("the first slice's panel for every slice", RANKS, "panel_ptr + e * R", "panel_ptr + 0 * e * R", MERGED),
    Mutant("the first slice's rows of lora_B", RANKS, "(e - slice).to", "(0 * e - slice).to", MERGED),
    Mutant("a tile's last slice skipped", LINEAR, "SLICE_STEPS * RANK_STEPS", "RANK_STEPS", NARROW_SLICES),
    Mutant("slices past a tile's read", RANKS, "tl.where(e < last, R, 0)", "R", LAUNCHES),
    Mutant("adapters reach into the next slice", RANKS, " & (columns < (slice + 1) * WIDTH)", "", MERGED),
    Mutant("slices counted one too far", SLICES, "(slice > s)", "(slice >= s)", MERGED),
    Mutant("dyb of the wrong slice", PANEL, "enabled_slice(e, SLICES, ENABLED).to", "e.to", MERGED_RANKS),
    Mutant(
        "db of the wrong slice",
        ADAPTER,
        "left_ptr += enabled_slice(e, SLICES, ENABLED) * I",
        "left_ptr += e * I",
        MERGED,
    ),
    Mutant("db's panel of the first slice", ADAPTER, "panel_ptr += e * R", "panel_ptr += 0 * e * R", MERGED),
    Mutant(
        "adapters in the wrong slices", REFERENCE, "if enabled else piece", "if not enabled else piece", MERGED_TORCH
    ),
    Mutant("low-rank update 2 % too large", UPDATE, "+ acc * scale)", "+ acc * scale * 1.02)", LOOKUPS),
    Mutant(
        "low-rank update without its last ranks", UPDATE, "range(0, R, BLOCK_R", "range(0, R - 16, BLOCK_R", LOOKUPS
    ),
    Mutant("embedding's panel unscaled", UPDATE, "(left.to(tl.float32) * scale)", "left.to(tl.float32)", LOOKUPS),
    Mutant("the rows of other tokens", UPDATE, "left_ptr + rows[:, None]", "left_ptr + outs[:, None]", LOOKUPS),
    Mutant(
        "padding gets a gradient", EMBEDDING_OP, "weight.shape[0], padding_idx,", "weight.shape[0], -1,", LOOKUPS_TORCH
    ),
    Mutant("a gradient from every lookup", TOKENS, "(first == lookups)", "(first >= 0)", OF_TOKENS),
    Mutant(
        "a gradient from the last lookup", TOKENS, "tl.minimum(first, tl.min(", "tl.maximum(first, tl.max(", OF_TOKENS
    ),
    Mutant("padding's column is written", TOKENS, " & (tokens != padding_idx)", "", OF_TOKENS),
    Mutant("infinities of other tokens", TOKENS, "acc = tl.where(finite, acc, apart)", "acc = acc", OF_TOKENS),
    Mutant("more lookups than there are", TOKENS, "same & (others < M)[None, :]", "same", OF_TOKENS),
    Mutant("sums instead of means", TOKENS, "1.0 / tl.maximum(times, 1)", "1.0 * tl.minimum(times, 1)", OF_TOKENS),
    Mutant(
        "too many lookups", TOKENS, "lookups <= (MOST_LOOKUPS if measured else MOST_OTHER_LOOKUPS) and ", "", OF_TOKENS
    ),
    Mutant("lookups in a key without padding", TOKENS, "num_embeddings, padding_idx, s", "num_embeddings, s", KEYS),
    Mutant("nothing is zero", TOKENS, ".zero_()", "", OF_TOKENS),
    Mutant("as many lookups of any kind", TOKENS, "if measured else", "if True else", OF_TOKENS),
    Mutant(
        "a lookup's scaling is not seen",
        EMBEDDING_OP,
        '"embedding", choice.path, scaling',
        '"embedding", choice.path',
        REPEATED,
    ),
    Mutant(
        "a mean is a sum to the recording",
        EMBEDDING_OP,
        "choice.path, *lookups, scaling",
        "choice.path, scaling",
        REPEATED,
    ),
    Mutant(
        "renormalised while merged",
        EMBEDDING,
        "(self.padding_idx, None, 2.0,",
        "(self.padding_idx, 0.1, 2.0,",
        LOOKUPS_TORCH,
    ),
    Mutant(
        "effective weight's dA unscaled",
        WEIGHT_OP,
        "lora_B.t(), dw, scaling,",
        "lora_B.t(), dw, 1.0,",
        CONVOLUTIONS,
    ),
    Mutant("convolutions ignore dropout", CONV, "dropout_in_force(self.lora_dropout) == 0", "True", CONVOLUTIONS),
    Mutant(
        "plain checkpoint not used",
        CONV,
        "= state_dict.pop(prefix + name)",
        "= 0 * state_dict.pop(prefix + name)",
        PLAIN,
    ),
    Mutant(
        "merging in place",
        MERGE,
        "owner.weight = merged\n",
        "merged = owner.weight.copy_(merged)\n",
        MERGING,
    ),
    Mutant("state_dict holds the merged weight", MERGE, "if module._kept is not None:", "if False:", MERGING),
    Mutant(
        "changes while merged not seen", MERGE, "if source.tensor._version != source.version:", "if False:", MERGING
    ),
    Mutant("a changed adapter is merged in silence", MERGE, "changed != _BASE or captured", "captured", ANEW),
    Mutant("merging anew makes a new parameter", MERGE, "_alike(before.merged, merged)", "False", ANEW),
    Mutant(
        "another layout in the old storage",
        MERGE,
        "a.stride(), a.dtype, a.device) == (b.shape, b.stride()",
        "a.dtype, a.device) == (b.shape",
        ANEW,
    ),
    Mutant("eval() again does nothing", MERGE, "elif not mode:", "elif False:", ANEW),
    Mutant("a copy forgets what it has missed", MERGE, "source.tensor._version - source.version)", "0)", ANEW),
    Mutant("shared adapters merged too early", ADAPTER_FILE, "layer._merge_changes()", "pass", ANEW),
    Mutant(
        "loads act on the merged weight", MERGE, "before_loading = self._unmerge()", "before_loading = None", MERGING
    ),
    Mutant("casts leave a layer unmerged", MERGE, "was_merged = self.merged", "was_merged = False", MERGING),
    Mutant("every missing key excused", MERGE, "if key not in adapter]", "if False]", CHECKPOINTS),
    Mutant("partial adapters excused", MERGE, "if has_base and not has_adapter:", "if has_base:", CHECKPOINTS),
    Mutant("scaling not recovered", ADAPTER_FILE, "layer.scaling = layer.lora_alpha / layer.r", "pass", CHECKPOINTS),
    Mutant("a shipped table ignored", LOOKUP, "if shipped.is_file() else", "if False else", TABLES),
    Mutant("no table put back", LOOKUP, "_in_force = previous", "_in_force = None", TABLES),
    Mutant("any gain counts", SEARCH, "LEAST_GAIN = 0.02", "LEAST_GAIN = 0.0", TRIALS),
    Mutant("wrong tiles timed", SEARCH, "if not all(_error(*each) <= bound for", "if not all(True for", TRIALS),
    Mutant("other bits each time", SEARCH, "if not all(map(torch.equal, once, again)):", "if False:", TRIALS),
    Mutant("a convolution's bias forgotten", STATE, '[*owner, "conv", "bias"]', '[*owner, "conv", "b"]', CHECKPOINTS),
    Mutant("a seed for each row", FUNCTIONAL, "return seed.reshape(1)", "return seed", ("tests/test_functional.py",)),
    Mutant("gradients as constants", SHARED, "iter(_Once.apply(len(made), *made, *read))", "iter(made)", DIRECT),
    Mutant("tangents left out", SHARED, "if forward_mode or (", "if (", DIRECT),
    Mutant("tangents not seen", SHARED, "    if forward_ad._current_level >= 0:", "    if False:", DIRECT),
    Mutant("a merged weight written", MERGE, ", (_BASE, base), (_MERGED, merged))", ", (_BASE, base))", MERGING),
    Mutant("another weight than the merged one", MERGE, " and _is_anothers(weight, kept)", " and False", MERGING),
    Mutant("a scaling that is not merged", MERGE, "if kept.scaling != self.scaling or any", "if any", MERGING),
    Mutant("a scaling that nobody sees", MERGE, "if kept.scaling != self.scaling:", "if False:", MERGING),
    Mutant("drawn while merged", MERGE, 'if getattr(self, "_kept", None) is not None:', "if False:", MERGING),
    Mutant("merged into FSDP's parameter", MERGE, "_fsdp_flattened", "_no_such_thing", MERGING),
    Mutant(
        "a scaling that no file holds", ADAPTER_FILE, "else layer.scaling * layer.r", "else layer.lora_alpha", FILES
    ),
    Mutant("a mask's columns in 32 bits", DECODE, "column_offset.to(tl.uint32)", "column_offset", ONE_LAUNCH),
    Mutant("a part of the panel left out", DECODE, "static_range(PARTS)", "static_range(PARTS - 1)", ONE_LAUNCH),
    Mutant("a split left out", DECODE, "static_range(SPLITS)", "static_range(SPLITS - 1)", ONE_LAUNCH),
    Mutant("another slice's lora_B", DECODE, "(inside + e.to(tl.int64) * WIDTH)", "inside", ONE_LAUNCH),
    Mutant("flags not cleared", DECODE, "            tl.store(ready_ptr, 0)\n", "", ONE_LAUNCH),
    Mutant("another slice ahead", DECODE, "0, first_slice, last_slice", "0, last_slice - 1, last_slice", ONE_LAUNCH),
    Mutant(
        "the panel not waited for",
        DECODE,
        '        ready = tl.atomic_add(ready_ptr, 0, sem="acquire")\n        while',
        "        ready = panel_tiles\n        while",
        ONE_LAUNCH,
    ),
    Mutant("who saw the panel not cleared", DECODE, "            tl.store(seen_ptr, 0)\n", "", ONE_LAUNCH),
    Mutant("arrivals not cleared", DECODE, "        tl.store(arrived_ptr, 0)\n        tl", "        tl", ONE_LAUNCH),
    Mutant("scale forgotten", DECODE, "(total * scale).to", "total.to", ONE_LAUNCH),
    Mutant(
        "parts beside all splits",
        DECODE_TILES,
        "splits = tile.splits // 2\n",
        "splits = tile.splits\n",
        ONE_LAUNCH_PATH,
    ),
    Mutant(
        "panels of many ranks by few programs",
        DECODE_TILES,
        "splits=splits, panel_rows=panel_rows, p",
        "splits=splits, p",
        ONE_LAUNCH_PATH,
    ),
    Mutant(
        "panels beyond the room there is",
        DECODE_TILES,
        "min(PARTS_OF_MANY, room // cdiv(rows, panel_rows))",
        "PARTS_OF_MANY",
        ONE_LAUNCH_PATH,
    ),
    Mutant(
        "few rows' db by cuBLAS",
        UNFUSED,
        "few_rows_grad(dy, xa, None, xa, None, dtype)[1]",
        "_product(dy.t(), xa, dtype)",
        FEW,
    ),
    Mutant(
        "many rows' db in one launch",
        UNFUSED,
        "    if len(dy) <= scaled(_FEW_MASKED_ROWS, dy.device) and",
        "    if",
        FEW,
    ),
    Mutant("parts for splits anywhere", DECODE_TILES, "if capability != 90:", "if False:", ONE_LAUNCH_PATH),
    Mutant(
        "panels of many ranks longer than a tile",
        DECODE_TILES,
        " and tile.panel_rows * ranks <= found.parts * tile.block_m * tile.block_n",
        "",
        ONE_LAUNCH_PATH,
    ),
    Mutant("masks of many ranks beside two", DECODE_TILES, "many = None if drawn else", "many =", ONE_LAUNCH_PATH),
    Mutant("masks beside two", DECODE_TILES, " if tile.held == 1 or not drawn]", "]", ONE_LAUNCH_PATH),
    Mutant(
        "one program for room for two",
        DECODE_TILES,
        "room = processors * tile.held",
        "room = processors",
        ONE_LAUNCH_PATH,
    ),
    Mutant("wide pieces of any rows", DECODE_TILES, "tile.panel_rows * PIECE_OF_MANY <=", "0 <=", ONE_LAUNCH_PATH),
    Mutant(
        "many ranks by two elsewhere", LINEAR_CHOICE, "rows, out_features, ranks) is not None:", "0, 0, 0):", CHOICE
    ),
    Mutant("backwards of any ranks", LINEAR_CHOICE, "0 if ranks > _MOST_DECODED_RANKS else", "", CHOICE),
    Mutant(
        "more rows back of many ranks", LINEAR_CHOICE, " and ranks <= _MANY_RANKS\n    if few", "\n    if few", CHOICE
    ),
    Mutant(
        "few rows of any inputs",
        LINEAR_CHOICE,
        " and in_features <= _MOST_INPUTS_OF_MOST\n    large",
        "\n    large",
        CHOICE,
    ),
    Mutant(
        "second pieces of ranks",
        DECODE,
        "for start_r in range(0, RANKS, BLOCK_R):",
        "for start_r in range(0, 1):",
        ONE_LAUNCH,
    ),
    Mutant("drawn by the other tile", PANEL, " if dropout is None else tiles.drawn_panel", "", KERNEL_MASKS),
    Mutant("more programs than processors", DECODE_TILES, "tiles + panels > room", "tiles > room", ONE_LAUNCH_PATH),
    Mutant("no batch invariance", DISPATCH, "    if invariant_blocks:\n", "    if False:\n", ONE_LAUNCH_PATH),
    Mutant(
        "a plan for every dtype",
        REDUCE,
        "(scale, dtype, beside, None if other is None else other[1])",
        "(scale,)",
        KEYS,
    ),
    Mutant(
        "a plan for every scaling", PANEL, "facts = (tile, precision, scale, *", "facts = (tile, precision, *", KEYS
    ),
    Mutant(
        "a plan for every pattern",
        DECODE_LAUNCH,
        "*dropout_facts(dropout), *enable_lora)",
        "*dropout_facts(dropout))",
        KEYS,
    ),
    Mutant("a mask drawn but not applied", DECODE, "x = kept(keep, x)", "x = x", ONE_LAUNCH),
    Mutant("given bits ignored", DECODE, "base + tl.where(keep, acc, 0.0)", "base + acc", ONE_LAUNCH),
    Mutant(
        "given bits mask the base too",
        DECODE,
        "base + tl.where(keep, acc, 0.0)",
        "tl.where(keep, base + acc, 0.0)",
        ONE_LAUNCH,
    ),
    Mutant("1/q missing from the one launch", DECODE_LAUNCH, "scale /= dropout.keep_probability", "pass", ONE_LAUNCH),
    Mutant("bits stored for a later piece of ranks", DECODE, "start_r == 0, M, 0", "start_r == 64, M, 0", ONE_LAUNCH),
    Mutant(
        "da of few rows without its mask",
        FEW_ROWS,
        "left = tl.where(unpacked(bits, BLOCK_M, BLOCK_I), left, tl.zeros_like(left))",
        "left = left",
        FEW,
    ),
    Mutant(
        "the last rows' gradients left out", FEW_ROWS, "range(0, M, BLOCK_M)", "range(0, M - BLOCK_M, BLOCK_M)", FEW
    ),
    Mutant("db of the wrong columns", FEW_ROWS, "tile - tiles_of_x, M, N", "tile, M, N", FEW),
    Mutant("a call repeated with another scaling", REPEAT, "trains, *numbers,", "trains, *numbers[1:],", AGAIN),
    Mutant("a call repeated for another pattern", FUNCTIONAL, "fan_in_fan_out, *enable_lora", "fan_in_fan_out", AGAIN),
    Mutant("a call repeated at any alignment", REPEAT, "x.get_device(), x.data_ptr() % 16,", "x.get_device(),", AGAIN),
    Mutant("a call repeated on another backend", REPEAT, "        backend, trains", "        trains", AGAIN),
    Mutant(
        "a call repeated under autocast",
        REPEAT,
        " or torch._C._is_any_autocast_enabled()",
        "",
        AGAIN,
    ),
    Mutant("a call repeated where paths are counted", REPEAT, "not here(x) or counted()", "not here(x)", AGAIN),
    Mutant("a call repeated on another GPU", REPEAT, "not here(x) or counted()", "counted()", AGAIN),
    Mutant("a weight repeated with another scaling", REPEAT, "scaling, backend, instr", "backend, instr", AGAIN),
    Mutant("a weight repeated on another backend", REPEAT, "scaling, backend, instr", "scaling, instr", AGAIN),
    Mutant("a weight repeated with other tiles", REPEAT, "counted() or tiles_in_force()", "counted()", AGAIN),
    Mutant("a step known by less", FUNCTIONAL, "row_offset, column_offset), (", "0, column_offset), (", KNOWN),
    Mutant("a step known for any columns", FUNCTIONAL, "row_offset, column_offset), (", "row_offset, 0), (", KNOWN),
    Mutant("a step known at any probability", FUNCTIONAL, "(scaling, dropout_p, row", "(scaling, 0.0, row", KNOWN),
    Mutant("a step known however it is stored", FUNCTIONAL, "fan_in_fan_out, *enable", "*enable", KNOWN),
    Mutant("a step known by another seed", FUNCTIONAL, "if not isinstance(seed, Tensor) and", "if", KNOWN),
    Mutant("a step known by a tensor", REPEAT, "type(dropout_p) not in (float, int)", "False", KNOWN),
    Mutant("a step known by a tensor's rows", REPEAT, "type(row_offset) is not int or ", "", KNOWN),
    Mutant("words of another launch", REPLAY, "in reversed(self.live.items())", "in self.live.items()", RECORDED),
    Mutant(
        "a batch of gradients without memory",
        SHARED,
        "direct(dy, *saved) and not",
        "direct(dy, *saved) or not",
        BATCHES,
    ),
    Mutant("a step known with any flags", REPEAT, "if type(flag) is not bool:", "if False:", KNOWN),
    Mutant(
        "a gradient known with other tiles", OPS, "program is not None and repeats(dy)", "program is not None", KNOWN
    ),
    Mutant("a gradient known elsewhere", OPS, "counted() or not here(dy)", "counted()", KNOWN),
    Mutant("zeros that have no memory", SHARED, " or tensor._is_zerotensor()", "", DIRECT),
    Mutant("repeated while hooks watch", REPLAY, "and not watched()", "", CALLS_REPEATED),
    Mutant("repeated with other tiles", REPLAY, " and not tiles_in_force()", "", CALLS_REPEATED),
    Mutant("repeated in float32", REPLAY, "and like.dtype.itemsize == 2 and", "and", CALLS_REPEATED),
    Mutant("repeated on another GPU", REPLAY, "t.get_device(), t.data_ptr()", "t.data_ptr()", CALLS_REPEATED),
    Mutant("a step known while hooks watch", REPEAT, " or watched()", "", KNOWN),
    Mutant("a step known with other tiles", REPEAT, "watched() or tiles_in_force()", "watched()", KNOWN),
    Mutant("a step known in float32", REPEAT, "x.dtype.itemsize != 2 or watched", "watched", KNOWN),
    Mutant("a step known as it is not stored", REPEAT, "weight.T if fan_in_fan_out else weight", "weight", KNOWN),
    Mutant("a step known where paths are counted", OPS, " or counted()", "", KNOWN),
    Mutant(
        "a backward known by less", OPS, "self.backwards.get(kinds)", "next(iter(self.backwards.values()), None)", KNOWN
    ),
    Mutant("backwards kept for ever", OPS, "if len(self.backwards) < _MOST_BACKWARDS:", "if True:", KNOWN),
    Mutant("an output that is a view", OPS, "torch.ops.aten._unsafe_view(y, (", "torch.Tensor.view(y, (", KNOWN),
    Mutant("rows copied on both ways", OPS, "x.dim() > 2 and x.is_contiguous()", "x.dim() > 2", KNOWN),
    Mutant("a panel's parts unscaled", SPLIT_PANEL, "(acc * scale)", "acc", UNMASKED),
    Mutant("a panel's part left out", SPLIT_PANEL, "tl.static_range(SPLITS)", "tl.static_range(1, SPLITS)", UNMASKED),
    Mutant("a panel's parts each the first", SPLIT_PANEL, "first = split * steps * BLOCK_I", "first = 0", UNMASKED),
    Mutant("a panel's counts left", SPLIT_PANEL, "tl.store(arrived_ptr + tile, 0)", "pass", UNMASKED),
    Mutant("a panel's rows past the last", SPLIT_PANEL, "(rows[:, None] < M) & ", "", PANEL_ADDRESSES),
    Mutant("a panel by a factor of another dtype", SPLIT_PANEL, "and left.dtype == factor.dtype", "", UNMASKED),
    Mutant("a panel of what cannot be read", SPLIT_PANEL, "and describable(left)\n", "", UNMASKED),
    Mutant("a large panel not cuBLAS's", FUSED, "if not large and split_panel", "if split_panel", UNMASKED),
    Mutant("a descriptor without a context", LAUNCH, "torch.cuda.mem_get_info()", "pass", UNMASKED),
    Mutant(
        "what lies between columns its own",
        REPLAY,
        "given.is_contiguous() or (pointer == first and begins(tensor, given))",
        "True",
        RECORDED,
    ),
    Mutant("what lies otherwise its own", SPANS, "tensor.stride() == each.stride() and all", "all", RECORDED),
    Mutant("what reaches out its own", REPLAY, "pointer and end <= last and whole", "pointer and whole", RECORDED),
    Mutant(
        "a panel's parts in another order", SPLIT_PANEL, "+ s * (BLOCK_M", "+ (SPLITS - 1 - s) * (BLOCK_M", UNMASKED
    ),
    Mutant(
        "a panel by another scaling's key",
        SPLIT_PANEL,
        "(tile, transposed, splits, scale, *",
        "(tile, transposed, splits, *",
        KEYS,
    ),
    Mutant("a panel by another mask's key", SPLIT_PANEL, "scale, *dropout_facts(dropout))", "scale)", KEYS),
    Mutant("a tile of panels not looked at", TUNING, "xa, *gradients, *alone", "xa, *gradients", TRIALS),
    Mutant("a tile of masks not looked at", TUNING, "*gradients, bits, *drawn", "*gradients, bits", MASKED_TRIALS),
    Mutant("one graph of each step", TIMING, "for _ in range(captures)]", "for _ in range(1)]", TURNS),
    Mutant("every row the first", INVARIANT, "row = x[m : m + 1]", "row = x[:1]", ONE_LAUNCH_PATH),
    Mutant("new files in PEFT's folder", ADAPTER_IO, "folder.resolve() in place.parents", "False", COMMANDS),
    Mutant(
        "an adapter under another name", ADAPTER_IO, "part.exists() and place.samefile(part)", "place == part", COMMANDS
    ),
    Mutant(
        "convert overwrites its source",
        CLI_FILES,
        "check_overwrites_none(arguments.target,",
        "filter(arguments.target,",
        COMMANDS,
    ),
    Mutant("another file than the named", ADAPTER_IO, "folder / name if name else new", "new", IO),
    Mutant(
        "any ending of PEFT's name",
        ADAPTER_IO,
        "path.name in _PEFT_TENSORS and (path",
        'path.name.startswith("adapter_model.") and (path',
        IO,
    ),
    Mutant(
        "a head of its own forgotten",
        MERGE_FILE,
        "if not is_tied or any(_is_head(key) for key in tensors):",
        "if not is_tied:",
        MODEL_FILES,
    ),
    Mutant("strict lets a tied head pass", CLI_FILES, "arguments.strict and report.tied", "False", COMMANDS),
    Mutant("OLoRA in another case", PEFT_CONFIG, "init.lower().startswith", "init.startswith", IO),
    Mutant("texts for switches", PEFT_CONFIG, "type(value) is not bool", "False", IO),
    Mutant(
        "a layer's own layout ignored",
        OUTSIDE,
        "return self.fan_in_fan_out if layer.fan_in_fan_out is None else layer.fan_in_fan_out",
        "return self.fan_in_fan_out",
        SUMS,
    ),
    Mutant("embeddings read as linear", ADAPTER_IO, "kind=config.kind or (", "kind=(", IO),
    Mutant(
        "one layout for all layers",
        STATE_MERGE,
        "{key for key in square if taken[key]}",
        "set(square) if any(taken.values()) else set()",
        SUMS,
    ),
    Mutant(
        "a layout's contradiction ignored",
        STATE_MERGE,
        "taken[key] != (key in transposed)",
        "taken[key] < (key in transposed)",
        SUMS,
    ),
    Mutant("a lost layout not said", FORMATS, "if transposed and not spelling.stores_layout:", "if False:", SPELT),
    Mutant("a lost dropout not said", FORMATS, "if not spelling.stores_dropout and any(", "if any(() and ", SPELT),
    Mutant(
        "one slice left undecided",
        CLI_FILES,
        "with_slices_of(base, adapter).with_names",
        "adapter.with_names",
        COMMANDS,
    ),
    Mutant(
        "one slice written as linear",
        FORMATS,
        'if stored.kind == "linear" and stored.enable_lora is not None:',
        "if False:",
        COMMANDS,
    ),
    Mutant(
        "enable_lora for nothing",
        OUTSIDE,
        "if not any(layer is not self.layers[path] for path, layer in layers.items()):",
        "if False:",
        SPELT,
    ),
    Mutant("AdaLoRA as LoRA", FORMATS, 'or any(part.startswith("lora_") for part in parts)', "", SPELT),
    Mutant("unused alphas ignored", FORMATS, '(".alpha", ".diff", ".diff_b")', '(".diff", ".diff_b")', SPELT),
    Mutant(
        "biases keep their old names",
        OUTSIDE,
        "if owner in names else key\n            if",
        "if False else key\n            if",
        COMMANDS,
    ),
    Mutant("owners without a layer not named", STATE_MERGE, "for name in adapter.others]", "for name in ()]", COMMANDS),
    Mutant("infinities written", STATE_MERGE, "if bool(lost.any()):", "if False:", SUMS),
    Mutant(
        "a scaling beyond float32",
        STATE_MERGE,
        "if not abs(factor) <= torch.finfo(torch.float32).max:",
        "if False:",
        SUMS,
    ),
    Mutant(
        "numbers cast to codes",
        STATE_MERGE,
        "not (_is_wide(tensor.dtype) and _is_wide(base[key].dtype))",
        "False",
        SUMS,
    ),
    Mutant("codes cast to numbers", STATE_MERGE, "or not _is_wide(base.dtype) else dtype", "else dtype", MODEL_FILES),
    Mutant(
        "merged as integers",
        STATE_MERGE,
        "isinstance(dtype, torch.dtype) and _is_wide(dtype)",
        "isinstance(dtype, torch.dtype)",
        SUMS,
    ),
    Mutant("files for their owner alone", WHOLE, "file.chmod(mode)", "pass", WRITERS),
    Mutant(
        "writers share a name",
        WHOLE,
        "unfinished = Path(beside, path.name)",
        'unfinished = path.with_name(path.name + ".unfinished")',
        WRITERS,
    ),
    Mutant("the current folder replaced", WHOLE, ' or path.samefile(".")', "", WRITERS),
    Mutant("endings that are misread", ADAPTER_FILE, "if (ending in PICKLES) != (suffix in PICKLES):", "if False:", IO),
    Mutant("save_adapter ends as a pickle", ADAPTER_FILE, '    check_ending(path, ".safetensors")\n', "", FILES),
    Mutant("chat templates left out", MERGE_FILE, '*base.glob(f"{_TEMPLATES}/*.jinja")', "", MODEL_FILES),
    Mutant("a write that is lost in silence", MERGE, " or before.changed(_MERGED))", ")", MERGING),
    Mutant("a replaced weight lost in silence", MERGE, "(weight is not before.merged or before", "(before", MERGING),
    Mutant("a copy of the base taken for merged", MERGE, "torch.equal(weight, base) and", "False and", MERGING),
    Mutant("a copy of the merge taken for the base", MERGE, " and not torch.equal(weight, merged)", "", MERGING),
    Mutant("a trace that holds an answer", MERGE, "if torch._C._len_torch_dispatch_stack() > 0 or", "if", MERGING),
    Mutant("a merged weight without its gradient", MERGE, "merged.grad = base.grad", "merged.grad = None", MERGING),
    Mutant("a gradient that cannot be cleared", MERGE, "if base.grad is before.grad:", "if False:", MERGING),
    Mutant("a cleared gradient comes back", MERGE, "if base.grad is before.grad:", "if True:", MERGING),
    Mutant("a gradient with two owners", MERGE, "before.merged.grad = None", "pass", MERGING),
    Mutant("a Tensor's scaling kept", MERGE, "float(self.scaling), counted", "self.scaling, counted", MERGING),
    Mutant("unmerged over a parametrization", MERGE, 'if "weight" not in owner._parameters:', "if False:", MERGING),
    Mutant("an adapter dropped in silence", STATE, "if layer._has_adapter:", "if False:", LOADED),
    Mutant("a scaling that gets no gradient", FUNCTIONAL, " and scaling.requires_grad:", " and False:", BAD),
    Mutant("a bool for a rank", BASE, "if isinstance(value, bool) else", "if False else", BAD),
    Mutant("an x of any layout", FUNCTIONAL, "if x.layout is not torch.strided:", "if False:", LAYOUTS),
    Mutant("warmup renormalises", WARM, ', "max_norm": None}', "}", WARMUP),
    Mutant(
        "warmup runs parameters' hooks", WARM, "tensor.detach().requires_grad_(tensor.requires_grad)", "tensor", WARMUP
    ),
    Mutant("warmup without dropout", WARM, "nn.Dropout(p)", "nn.Identity()", WARMUP),
    Mutant("FLOPs of the base left out", FLOPS, "(weight[0] * K + lora_A", "(lora_A", COUNTED),
    Mutant("FLOPs of dx without its panel's", FLOPS, "weight[1] * (N + lora_A[0])", "weight[1] * N", COUNTED),
    Mutant("FLOPs of every slice counted", FLOPS, "N // len(enable_lora) * xa[1]", "N * xa[1]", COUNTED),
    Mutant(
        "FLOPs of a weight's adapter by half",
        FLOPS,
        "return 2 * lora_B[0] * lora_B[1] * lora_A[1]",
        "return lora_B[0] * lora_B[1] * lora_A[1]",
        COUNTED,
    ),
)


def snapshot(source: Path, target: Path) -> Path:
    # Hidden entries are caches, environments and git's; the link to kernels/ must stay one, or edits would miss it.
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo-output")
    shutil.copytree(source, target, symlinks=True, ignore=ignore)
    return target


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        # The interpreter survives a bad address that would poison a GPU's context for every test after it.
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        # pytest cuts its summary to the terminal's width, and with it the reason of a failure.
        "COLUMNS": "500",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )


def pytest(root: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    return python(root, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests)


def require_imports_from(root: Path) -> None:
    """An editable install of the repository must not win over the copy, or every mutant would survive."""
    code = "import fused_lora, fused_lora.kernels.panel as p; print(fused_lora.__file__, p.__file__, sep='\\n')"
    result = python(root, "-c", code)
    files = [Path(line).resolve() for line in result.stdout.splitlines()]
    if result.returncode != 0 or files != [root / "fused_lora/__init__.py", root / PANEL]:
        raise BrokenRun(f"The copy in {root} is not what Python imports: {result.stdout}{result.stderr}")


def require_passes(root: Path, tests: tuple[str, ...]) -> None:
    result = pytest(root, tests)
    if result.returncode != 0:
        raise BrokenRun(f"pytest {' '.join(tests)} exits with {result.returncode} unmutated:\n{result.stdout}")


def verdict(mutant: Mutant, pristine: Path) -> str:
    """The first test that misses what it asserts or an error, or SURVIVED, or BROKEN where pytest ended otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        root = snapshot(pristine, Path(folder).resolve() / "copy")
        (root / mutant.path).write_text(mutant.mutated(root))
        result = pytest(root, mutant.tests)
    if result.returncode == 0:
        return SURVIVED
    failed = re.search(r"^FAILED (.+?) - (assert |.*AssertionError|Failed: DID NOT RAISE)", result.stdout, re.MULTILINE)
    if result.returncode != 1 or failed is None:
        return f"{BROKEN}, pytest exits with {result.returncode}:\n{result.stdout}{result.stderr}"
    return failed[1]


def main() -> int:
    began = time.monotonic()
    counts = {BROKEN: 0, SURVIVED: 0}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        # One copy for the whole run, so that edits made meanwhile do not mix with it.
        pristine = snapshot(ROOT, Path(folder).resolve() / "copy")
        for mutant in MUTANTS:
            mutant.mutated(pristine)
        require_imports_from(pristine)
        selections = dict.fromkeys(mutant.tests for mutant in MUTANTS)
        list(pool.map(lambda tests: require_passes(pristine, tests), selections))
        verdicts = pool.map(lambda mutant: verdict(mutant, pristine), MUTANTS)
        for mutant, outcome in zip(MUTANTS, verdicts, strict=True):
            print(f"{mutant.name:38} {mutant.path:24} {outcome}", flush=True)
            for word in counts:
                counts[word] += outcome.startswith(word)
    killed = len(MUTANTS) - sum(counts.values())
    print(f"{killed} of {len(MUTANTS)} mutants killed in {time.monotonic() - began:.0f} s")
    return 0 if killed == len(MUTANTS) else 1


if __name__ == "__main__":
    sys.exit(main())
