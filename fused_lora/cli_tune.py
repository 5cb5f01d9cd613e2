"""The command tune: finds tiles for this machine's GPU and writes them into a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cli_files import failing_in_one_sentence
from .dispatch import obstacle_to_kernels
from .kernels.config import capability
from .kernels.lookup import VARIABLE, cached
from .kernels.tiles_file import Tuned, as_json
from .whole import written_whole

if TYPE_CHECKING:
    from .tuning import Trial


def add_tune_command(commands: Any) -> None:
    """Adds the command to argparse's subparsers; it sets `run`, a function from arguments to exit code."""
    tune = commands.add_parser("tune", help="find faster tiles for this machine's GPU; some minutes")
    tune.add_argument(
        "--shapes", required=True, nargs="+", type=_shape, metavar="KxN", help="layers' in_features x out_features"
    )
    tune.add_argument("--tokens", type=int, default=8192, help="rows of their input (default: 8192)")
    tune.add_argument("--ranks", type=int, nargs="+", default=[16], help="of their adapters (default: 16)")
    tune.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="(default: bfloat16)")
    tune.add_argument("--output", type=Path, help="the file to write (default: one in the user's cache folder)")
    tune.set_defaults(run=failing_in_one_sentence(_tune))


def _shape(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape is {text!r}; expected in_features x out_features, as 4096x14336.")
    return int(sizes[0]), int(sizes[1])


def _tune(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("This machine has no CUDA GPU; expected one to tune for.")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, arguments.dtype)
    obstacle = obstacle_to_kernels(device, dtype, dtype)
    if obstacle is not None:
        raise ValueError(f"Nothing can be tuned, because {obstacle}.")
    import triton

    from .tuning import tune

    name, path = torch.cuda.get_device_name(device), arguments.output
    if path is None:
        path = cached(name)
        path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        # What cannot be written shows now, not after minutes.
        unfinished.touch()
        tiles = tune(
            arguments.shapes, device, tokens=arguments.tokens, ranks=arguments.ranks, dtype=dtype, on_trial=_show
        )
        unfinished.write_text(as_json(Tuned(tiles, name, capability(device), triton.__version__)), encoding="utf-8")
    print(f"{'written':<20}{path}; set {VARIABLE}={'cache' if arguments.output is None else path} to use it")
    return 0


def _show(trial: Trial) -> None:
    kernel = trial.kernel if trial.rank_block is None else f"{trial.kernel} {trial.rank_block}"
    outcome = trial.outcome if trial.ms is None else f"{trial.ms:.4f} ms"
    numbers = " ".join(f"{name}={value}" for name, value in vars(trial.tile).items())
    print(f"{kernel:<20}{outcome:<15}{numbers}", flush=True)
