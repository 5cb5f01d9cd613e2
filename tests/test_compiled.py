"""Every kernel compiles ahead of time for every architecture's table, with no GPU: see aot.py.

The budgets: no spilled register, shared memory within what a block may have, the matrix instructions that were meant
(and none for IEEE float32, which they would round to tf32), and in the GEMMs no serialisation of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed, so there is nothing to compile")

ROOT = Path(__file__).parents[1]

# 89 stands for the GPUs that have no table and get the safe one; of them it allows a block the least shared memory.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
MATRIX_INSTRUCTIONS = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}
BEST_INSTRUCTION = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def budget_violations(capability: int, report: dict[str, Any]) -> list[str]:
    found, kernel = set(report["instructions"]), report["kernel"]
    violations = []
    if report["spilled_bytes"]:
        violations.append(f"spills {report['spilled_bytes']} bytes")
    if report["shared"] > SHARED_KIB[capability] * 1024:
        violations.append(f"takes {report['shared']} bytes of shared memory")
    if kernel not in ("_reduce_kernel", "_mask_kernel", "_narrow_kernel"):
        matrix = found & MATRIX_INSTRUCTIONS[capability]
        if report["dtype"] == "float32" and matrix:
            violations.append(f"multiplies IEEE float32 by {matrix}")
        if report["dtype"] != "float32" and not matrix:
            violations.append("has no matrix instruction")
    of_many_rows = kernel in ("_extended_kernel", "_fused_linear_kernel", "_own_panel_kernel")
    if (of_many_rows or kernel == "decode_kernel") and report["regular"]:
        if report["serialised"]:
            violations.append("has its matrix instructions serialised by ptxas")
        if of_many_rows and BEST_INSTRUCTION[capability] not in found:
            violations.append(f"has no {BEST_INSTRUCTION[capability]}")
    return violations


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_compiles_within_its_budget(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), str(capability)]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    kernels = {"decode", "few_rows_grad", "fused_linear", "panel", "adapter_grad", "low_rank_update", "reduce", "mask"}
    kernels |= {"token_grad"}
    kernels |= {"extended", "narrow", "split_panel"} if capability >= 90 else set()
    kernels |= {"own_panel"} if capability == 90 else set()
    assert {report["kernel"].lstrip("_") for report in reports} == {f"{name}_kernel" for name in kernels}
    complaints = [
        f"{report['kernel']} {violation} for {report['case']}"
        for report in reports
        for violation in budget_violations(capability, report)
    ]
    assert not complaints, "\n".join(complaints)
