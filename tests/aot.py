"""Compiles every kernel for one architecture through the real launchers, with no GPU: python aot.py 90.

Prints one JSON line per compiled kernel: what it was for, spilled bytes, whether
ptxas serialised the matrix instructions, shared memory, which matrix instructions there are.
Runs as its own process, since Triton must not be in interpreter mode and the driver is replaced by a stand-in.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from fused_lora import decoding, fused, unfused
from fused_lora.kernels import (
    adapter_grad,
    config,
    decode_tiles,
    first_wave,
    fused_linear,
    launch,
    lookup,
    low_rank_update,
    mask,
    own_panel,
    panel,
    split_panel,
)
from fused_lora.reference import Dropout

MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "FFMA")


class NoGPU:
    """A driver that knows its target and can launch nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Case:
    dtype: str
    adapter_dtype: str
    r: int
    dropout: bool = False
    column_offset: int = 0
    shape: tuple[int, int, int] = (8192, 4096, 4096)
    tf32: bool = False
    fan_in_fan_out: bool = False
    enable_lora: tuple[bool, ...] = (True,)


WIDTHS = (1024, 4096, 14336)
CASES = [
    Case("bfloat16", "bfloat16", 16),
    Case("bfloat16", "float32", 16, dropout=True),
    Case("bfloat16", "float32", 16, shape=(8192, 4096, 14336)),
    Case("float16", "float16", 33, dropout=True, shape=(8192, 4096, 1008)),
    Case("bfloat16", "float32", 64, dropout=True, fan_in_fan_out=True),
    Case("bfloat16", "bfloat16", 64),
    Case("bfloat16", "bfloat16", 64, dropout=True),
    Case("bfloat16", "bfloat16", 128),
    Case("bfloat16", "bfloat16", 128, dropout=True, fan_in_fan_out=True),
    Case("bfloat16", "float32", 128, dropout=True),
    Case("bfloat16", "bfloat16", 256, dropout=True),
    Case("bfloat16", "bfloat16", 16, dropout=True, column_offset=5, shape=(37, 53, 41)),
    Case("bfloat16", "bfloat16", 16, dropout=True, column_offset=5),
    Case("bfloat16", "float32", 128, shape=(37, 53, 41)),
    Case("float32", "float32", 16, dropout=True),
    Case("float32", "float32", 64, dropout=True, tf32=True),
    Case("float32", "float32", 100, dropout=True, column_offset=5, shape=(37, 53, 41)),
    # Few rows.
    *(Case("bfloat16", "bfloat16", r, dropout=True, shape=(1024, 4096, 4096)) for r in (16, 32, 64, 128)),
    Case("float16", "float32", 64, shape=(2048, 4096, 1024)),
    # Slices that tiles do not cross, and slices that they do.
    Case("bfloat16", "bfloat16", 16, dropout=True, shape=(8192, 4096, 12288), enable_lora=(True, False, True)),
    Case("bfloat16", "float32", 64, shape=(8192, 1600, 4800), enable_lora=(True, True, True), fan_in_fan_out=True),
    Case("bfloat16", "bfloat16", 32, shape=(8192, 1600, 4800), enable_lora=(True, True, True)),
    Case("bfloat16", "bfloat16", 16, dropout=True, shape=(8192, 1600, 4800), enable_lora=(True, False, True)),
    Case("float32", "float32", 8, shape=(37, 53, 123), enable_lora=(False, True, True)),
]


# A forward whose tiles each compute their panel, with every tile of the tables.
OWN_PANEL = [
    *(Case("bfloat16", adapter, r, shape=(m, 4096, 1024)) for m in (1024, 2048)
      for adapter, r in (("bfloat16", 16), ("float32", 16), ("bfloat16", 64), ("float32", 64))),
    Case("float16", "float16", 16, shape=(2048, 4096, 1024), fan_in_fan_out=True),
    Case("bfloat16", "bfloat16", 8, shape=(2048, 4096, 1008), enable_lora=(True, False, True)),
    Case("bfloat16", "bfloat16", 1, shape=(2048, 4096, 1008), enable_lora=(True, True, True)),
]  # fmt: skip

# A forward whose panel comes with the first of several waves of tiles.
FIRST_WAVE = [
    *(
        Case("bfloat16", adapter, r)
        for adapter, r in (("bfloat16", 16), ("float32", 8), ("float32", 48), ("float32", 64))
    ),
    Case("float16", "float16", 5, shape=(8192, 4096, 4000)),
    Case("bfloat16", "bfloat16", 16, shape=(8192, 4096, 12288), enable_lora=(True, False, True)),
]

# A panel alone, with every tile and divided into all numbers of parts; of a backward where it is fan_in_fan_out.
SPLIT_PANEL = [
    *(Case("bfloat16", "bfloat16", r, shape=(512, 4096, 4096)) for r in (16, 32, 64, 128)),
    *(Case("float16", "float16", r, shape=(512, 4096, 4096), fan_in_fan_out=True) for r in (16, 128)),
]

# With a stage more than the table has.
TIGHT = [
    *(Case("bfloat16", "bfloat16", r) for r in (16, 32, 64, 128)),
    Case("bfloat16", "bfloat16", 32, shape=(8192, 1600, 4800), enable_lora=(True, True, True)),
]

# A layer's forward in one launch, with every tile of the tables and whatever else makes another kernel.
DECODED = [
    *(Case("bfloat16", "bfloat16", 16, shape=(m, 4096, n)) for m in (1, 32, 64, 128, 256, 512, 2048) for n in WIDTHS),
    # Rows that do not fill their tiles.
    *(Case("bfloat16", "bfloat16", 16, shape=(m, 4096, n)) for m in (40, 100, 200, 300) for n in (1024, 4096)),
    Case("float16", "float32", 64, shape=(16, 4096, 4096)),
    *(Case("bfloat16", "bfloat16", 64, shape=(m, 4096, 1024)) for m in (32, 64, 128)),
    *(Case("bfloat16", "float32", 256, shape=(m, 4096, 4096)) for m in (32, 64, 128, 256, 512, 2048)),
    *(Case("bfloat16", "bfloat16", 16, dropout=True, shape=(m, 4096, 4096)) for m in (1, 32, 64)),
    *(
        Case("bfloat16", "bfloat16", r, dropout=True, shape=(m, 4096, n))
        for m in (128, 256, 512)
        for n in WIDTHS
        for r in (16, 64)
    ),
    *(Case("bfloat16", "float32", r, dropout=True, shape=(1024, 4096, 1024)) for r in (16, 64)),
    *(Case("bfloat16", "float32", 256, dropout=True, column_offset=5, shape=(m, 4096, 1024)) for m in (32, 128)),
    Case("bfloat16", "bfloat16", 0, shape=(16, 4096, 4096)),
    Case("bfloat16", "bfloat16", 16, shape=(16, 4096, 12288), enable_lora=(True, False, True)),
    Case("bfloat16", "bfloat16", 16, shape=(16, 1600, 4800), enable_lora=(True, True, True), fan_in_fan_out=True),
    Case("bfloat16", "bfloat16", 16, shape=(37, 53, 41)),
    Case("float32", "float32", 16, shape=(16, 4096, 4096)),
    Case("float32", "float32", 100, shape=(37, 53, 41)),
]

# What Hopper's table alone has: two programs on a multiprocessor, and panels of many ranks in parts and pieces of their
# own.
HOPPERS = [
    *(Case("bfloat16", "bfloat16", r, shape=(m, 4096, 2048)) for m in (512, 640) for r in (16, 64)),
    *(Case("bfloat16", "bfloat16", 128, shape=(m, 4096, n)) for m in (16, 32, 64, 128, 256, 512) for n in (1024, 4096)),
    *(Case("bfloat16", "float32", 128, shape=(m, 4096, n)) for m, n in ((32, 14336), (64, 4096), (256, 4096))),
    *(Case("bfloat16", "float32", 128, shape=(m, 4096, n)) for m, n in ((512, 4096), (1000, 1024))),
    Case("bfloat16", "bfloat16", 96, shape=(200, 4096, 8192)),
    Case("bfloat16", "bfloat16", 128, shape=(1000, 4096, 1024)),
    *(Case("bfloat16", "bfloat16", 256, dropout=True, shape=(m, 4096, n)) for m, n in ((16, 4096), (128, 14336))),
    *(Case("bfloat16", "bfloat16", 128, dropout=True, shape=(m, 4096, n)) for m in (16, 64, 128) for n in (1024, 8192)),
    Case("bfloat16", "float32", 128, dropout=True, shape=(64, 4096, 1024)),
]


def as_on_a_gpu(capability: int, device: torch.device, *arguments: Any, **options: Any) -> config.Tiles:
    """lookup.tiles_for, for tensors that lie on the CPU here and on a GPU in earnest."""
    lookup.table_of = lambda device: config.TABLES.get(capability, config.SAFE)
    return lookup.tiles_for(torch.device("cuda", 0), *arguments, **options)


def decode_tile_as_on_a_gpu(
    capability: int, device: torch.device, *arguments: Any, **options: Any
) -> decode_tiles.DecodeTile:
    decode_tiles.capability = lambda device: capability
    decode_tiles.processors = lambda device: 132
    return decode_tiles.decode_tile(torch.device("cuda", 0), *arguments, **options)


def own_panel_tile_as_on_a_gpu(capability: int, device: torch.device, *arguments: Any) -> config.LinearTile | None:
    own_panel.capability = lambda device: capability
    own_panel.processors = lambda device: 132
    return TILE_OF(torch.device("cuda", 0), *arguments)


TILE_OF = own_panel.tile_of


def drawn_layout_as_on_a_gpu(device: torch.device, *sizes: int) -> tuple[split_panel.SplitPanelTile, int]:
    return DRAWN_LAYOUT_OF(torch.device("cuda", 0), *sizes)


DRAWN_LAYOUT_OF = split_panel.drawn_layout_of


def assembler_report(ptx: str, capability: int) -> dict[str, Any]:
    assembler = get_ptxas(capability).path
    name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [assembler, "-v", f"--gpu-name={name}", source.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert found, log
    return {"spilled_bytes": sum(map(int, found)), "serialised": "serialized" in log}


def tensors_of(case: Case) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, lora_A, lora_B."""
    dtype, adapter_dtype = getattr(torch, case.dtype), getattr(torch, case.adapter_dtype)
    m, k, n = case.shape
    x = torch.empty(m, k, dtype=dtype)
    weight = torch.empty(k, n, dtype=dtype).T if case.fan_in_fan_out else torch.empty(n, k, dtype=dtype)
    bias = torch.empty(n, dtype=dtype)
    enabled, rows = sum(case.enable_lora), n // len(case.enable_lora) * sum(case.enable_lora)
    lora_A = torch.empty(enabled * case.r, k, dtype=adapter_dtype)
    return x, weight, bias, lora_A, torch.empty(rows, case.r, dtype=adapter_dtype)


def regular(case: Case) -> bool:
    """Whether the kernels are taken for it unasked."""
    return case.dtype != "float32" and all(size % 16 == 0 for size in case.shape)


def compile_decode(case: Case) -> None:
    x, weight, bias, lora_A, lora_B = tensors_of(case)
    dropout = Dropout(torch.zeros(1, dtype=torch.int64), 6554, column_offset=case.column_offset)
    options = {"scaling": 2.0, "dropout": dropout if case.dropout else None, "enable_lora": case.enable_lora}
    _, xa, bits = decoding.forward(x, weight, bias, lora_A, lora_B, **options)
    if case.enable_lora == (True,) and len(x) <= 128 and regular(case):
        gradients = {"bits": bits, "scaling": 2.0, "dtype": lora_A.dtype}
        decoding.backward(x.new_empty(len(x), len(weight)), x, weight, lora_A, lora_B, xa, **gradients)


def compile_case(case: Case) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    x, weight, bias, lora_A, lora_B = tensors_of(case)
    dy, adapter_dtype = x.new_empty(len(x), len(weight)), lora_A.dtype
    seed = torch.zeros(1, dtype=torch.int64)
    dropout = Dropout(seed, 6554, column_offset=case.column_offset) if case.dropout else None
    slices = {"scaling": 2.0, "enable_lora": case.enable_lora}
    _, xa, bits = fused.forward(x, weight, bias, lora_A, lora_B, dropout=dropout, **slices)
    gradients = {"bits": bits, "scaling": 2.0, "dtype": adapter_dtype, "enable_lora": case.enable_lora}
    fused.backward(dy, x, weight, lora_A, lora_B, xa, **gradients)
    fused.backward(dy, x, None, None, lora_B, xa, **gradients)
    unfused.backward(dy, x, weight, lora_A, lora_B, xa, **gradients)
    unfused.forward(x, weight, bias, lora_A, lora_B, dropout=dropout, **slices)
    if bits is not None:
        mask.add_kept_(dy.new_empty(x.shape), xa, lora_A, bits, None)
        mask.add_kept_(dy.new_empty(x.shape), xa, lora_A, bits, x)
        mask.drop_again(x, bits)
    if case.enable_lora == (True,):
        fused.effective_weight(weight, lora_A, lora_B, scaling=2.0)
        tokens = torch.zeros(len(x), dtype=torch.int64)
        fused.embedding(tokens, weight, lora_B.T.contiguous(), lora_A.T.contiguous(), scaling=2.0)
        for by_frequency in (False, True):
            fused.embedding_grad_lora_A(xa, tokens, len(weight), -1, by_frequency, adapter_dtype)


def main(capability: int) -> None:
    triton.runtime.driver.set_active(NoGPU(capability))
    for module in (first_wave, split_panel):
        module.processors = lambda device: 132
    for module in (fused, unfused, adapter_grad):
        module.scaled = lambda rows, device: rows
    # Nothing is multiplied.
    torch.mm = lambda left, right, **options: left.new_empty(len(left), right.shape[1])
    torch.addmm = lambda total, left, right, **options: left.new_empty(len(left), right.shape[1])
    torch.Tensor.addmm_ = lambda total, left, right: total
    for module in (first_wave, fused, fused_linear, panel, split_panel, adapter_grad, low_rank_update):
        module.tiles_for = partial(as_on_a_gpu, capability)
    split_panel._tiles_for = lambda device: split_panel._TILES
    split_panel.drawn_layout_of = drawn_layout_as_on_a_gpu
    fused.overlaps = lambda device: capability in (90, 100)
    own_panel.tile_of = partial(own_panel_tile_as_on_a_gpu, capability)
    decoding.decode_tile = partial(decode_tile_as_on_a_gpu, capability)
    # Nothing is to be launched again.
    launch.CompiledKernel = ()
    run, seen, current = JITFunction.run, set(), [CASES[0]]

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            sass = kernel.asm["sass"]
            name, dtype = self.fn.__name__, "tf32" if current[0].tf32 else current[0].dtype
            report = {
                "kernel": name,
                "case": str(current[0]),
                # A low-rank update multiplies in the adapter's dtype, and both of these float32 exactly.
                "dtype": {
                    "_low_rank_update_kernel": current[0].adapter_dtype,
                    "_token_grad_kernel": current[0].dtype,
                }.get(name, dtype),
                "regular": regular(current[0]),
                **assembler_report(kernel.asm["ptx"], capability),
                "shared": kernel.metadata.shared,
                "instructions": [name for name in MATRIX_INSTRUCTIONS if re.search(rf"\b{name}\b", sass)],
            }
            print(json.dumps(report), flush=True)
        return kernel

    JITFunction.run = compile_only
    for case in CASES:
        current[0] = case
        compile_case(case)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    for case in DECODED + (HOPPERS if capability == 90 else []):
        current[0] = case
        compile_decode(case)
    for case in OWN_PANEL:
        current[0] = case
        if own_panel.tile_of(torch.device("cpu"), torch.bfloat16, *case.shape) is not None:
            x, weight, bias, lora_A, lora_B = tensors_of(case)
            fused.forward(x, weight, bias, lora_A, lora_B, scaling=2.0, dropout=None, enable_lora=case.enable_lora)
    for case in SPLIT_PANEL if capability >= 90 else []:
        current[0] = case
        x, _, _, lora_A, lora_B = tensors_of(case)
        for layout in product(split_panel._TILES, split_panel._SPLITS):
            split_panel.layout_of = lambda *_, layout=layout: layout
            split_panel.split_panel(x, lora_B if case.fan_in_fan_out else lora_A.T, 2.0)
        dropout = Dropout(torch.zeros(1, dtype=torch.int64), 6554)
        of_many = [tile for most, tile in split_panel._DRAWN_OF_MANY.items() if case.r <= most]
        for layout in product([split_panel._DRAWN, *of_many[:1]], split_panel._SPLITS):
            split_panel.drawn_layout_of = lambda *_, layout=layout: layout
            split_panel.split_panel(x, lora_B if case.fan_in_fan_out else lora_A.T, 2.0, dropout)
    # Tiles that leave no room for all that the table's do.
    table = config.TABLES.get(capability, config.SAFE)
    tight = replace(table, linear=replace(table.linear, num_stages=table.linear.num_stages + 1))
    fused_linear.tiles_for = lambda *arguments, **options: tight
    for case in TIGHT if capability >= 90 else []:
        current[0] = case
        x, weight, bias, lora_A, lora_B = tensors_of(case)
        panel_of_x, panel_of_dy = x.new_empty(len(x), sum(case.enable_lora) * case.r), x.new_empty(len(x), len(lora_A))
        fused_linear.forward(x, weight, bias, panel_of_x, lora_B, case.enable_lora)
        for bits in (None, torch.empty(len(x), x.shape[1] // 8, dtype=torch.uint8)):
            fused_linear.grad_input(x.new_empty(len(x), len(weight)), weight, panel_of_dy, lora_A, bits)
    if capability == 90:
        fused_linear.tiles_for = partial(as_on_a_gpu, capability)
        first_wave.first_wave = lambda *sizes: first_wave.HOPPER
        for case in FIRST_WAVE:
            current[0] = case
            x, weight, bias, lora_A, lora_B = tensors_of(case)
            first_wave.forward(x, weight, bias, lora_A, lora_B, 2.0, case.enable_lora)


if __name__ == "__main__":
    main(int(sys.argv[1]))
