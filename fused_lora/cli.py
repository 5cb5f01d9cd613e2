"""The command line: `fused-lora demo | merge | convert | inspect | tune`, also as `python -m fused_lora ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .cli_files import add_file_commands
from .cli_tune import add_tune_command

_DEMO_PACKAGES = ("sklearn", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    argv: the arguments without the program's name; None takes sys.argv's. Raises SystemExit(2) for wrong ones. A
    command that fails for what its files hold, or for want of a GPU, prints one sentence on stderr and returns 2.
    """
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(prog="fused-lora", description="LoRA layers as fused Triton kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small transformer and check the results",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--device", choices=devices, default=devices[0], help="where to train")
    demo.add_argument("--output-dir", type=_directory, default="demo-output", help="gets loss.png and adapter.pt")
    demo.add_argument("--seed", type=_seed, default="0", help="fixes weights, data order and dropout")
    demo.set_defaults(run=lambda asked: _demo(torch.device(asked.device), asked.output_dir, asked.seed))
    add_file_commands(commands, devices)
    add_tune_command(commands)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _demo(device: torch.device, output_dir: Path, seed: int) -> int:
    try:
        from .demo import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_PACKAGES:
            raise
        print(f"The demo needs {package}; run pip install 'fused-lora[demo]'.", file=sys.stderr)
        return 1
    return run(device, output_dir, seed)


def _directory(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"output-dir is {text!r}, a file; expected a folder or a new path.")
    return path


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"seed is {text!r}; expected a whole number from 0 to 2**63 - 1.")
    return int(text)
