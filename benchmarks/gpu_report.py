"""python -m benchmarks.gpu_report: runs the tests, the demo and compute-sanitizer on this GPU and writes what passed.

Writes NAME.md, with the machine's header, and exits non-zero if anything failed. Needs the extra [test].
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import machine_header, markdown_table

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
SANITISED_TESTS = ["tests/test_kernels.py", "-k", "accurate or mask or empty or alone or reduce"]


@dataclass
class Outcome:
    what: str
    passed: bool
    result: str


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", flush=True)
    return done


def closing_line(output: str) -> str:
    return re.sub(r" in [\d.]+s.*", "", output.strip().splitlines()[-1]).strip("= ")


def selected_tests(expression: str) -> Outcome:
    done = run([*PYTEST, "tests/test_gpu.py", "-k", expression])
    what = f"tests/test_gpu.py -k '{expression}' on {torch.cuda.device_count()} GPUs"
    return Outcome(what, done.returncode == 0, closing_line(done.stdout))


def tests() -> Outcome:
    # Compiling ahead of time needs no GPU and many minutes of CPU; `make test` does it.
    done = run([*PYTEST, "--numprocesses", "12", "--ignore", "tests/test_compiled.py", "tests"])
    return Outcome(
        "the test-suite but for test_compiled.py, on CUDA tensors", done.returncode == 0, closing_line(done.stdout)
    )


def demo() -> Outcome:
    done = run([sys.executable, "-m", "fused_lora", "demo", "--device", "cuda"], COLUMNS="200")
    rows = [line for line in done.stdout.splitlines() if "ops run" in line or "after LoRA" in line]
    facts = "; ".join(" ".join(re.sub(r"[│|]", " ", row).split()) for row in rows)
    return Outcome("python -m fused_lora demo --device cuda", done.returncode == 0, facts)


def memcheck() -> Outcome:
    """The kernel tests under compute-sanitizer; without torch's caching allocator, whose neighbours hide overruns."""
    what = "compute-sanitizer memcheck on the kernel tests"
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return Outcome(what, False, "not run: compute-sanitizer is not installed")
    run([*PYTEST, *SANITISED_TESTS])  # compiles the kernels, which takes long under the sanitizer
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *PYTEST, *SANITISED_TESTS]
    done = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in done.stdout + done.stderr:
        return Outcome(what, False, "not run: this machine's runtime does not support it")
    summary = re.findall(r"ERROR SUMMARY: .*", done.stdout + done.stderr)
    passed = re.findall(r"\d+ passed[^\n]*?(?= in )", done.stdout)
    return Outcome(what, done.returncode == 0, "; ".join([*summary, *passed]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--select", help="run only the GPU tests that this pytest -k expression selects")
    parser.add_argument("--name", default="gpu_tests", help="stem of the file to write")
    parser.add_argument("--commit", help="what to write in the header; default: git describe")
    options = parser.parse_args()
    header = machine_header(options.commit)
    outcomes = [selected_tests(options.select)] if options.select else [tests(), demo(), memcheck()]
    rows = [[o.what, "passed" if o.passed else "FAILED", o.result] for o in outcomes]
    facts = ", ".join(f"{name} {value}" for name, value in header.items())
    text = f"What ran on a GPU\n\n{facts}\n\n{markdown_table(['what', 'outcome', 'result'], rows)}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.md").write_text(text)
    print(text)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
