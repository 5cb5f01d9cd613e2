"""How the demo shows its results: tables on the terminal, a picture of the losses, an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .demo_model import Score


@dataclass(frozen=True)
class Check:
    """A claim, whether it held, and the numbers that say so."""

    claim: str
    passed: bool
    measured: str


def exit_code(checks: Sequence[Check]) -> int:
    """0 if there are checks and all of them passed, else 1."""
    return 0 if checks and all(check.passed for check in checks) else 1


def print_tables(console: Console, scores: dict[str, Score], facts: dict[str, str], checks: Sequence[Check]) -> None:
    """scores: by what was evaluated; facts: by name; all printed in their order."""
    table = Table("held-out digits", "loss", "accuracy")
    for name, score in scores.items():
        table.add_row(name, f"{score.loss:.3f}", f"{score.accuracy:.1%}")
    console.print(table)
    table = Table("fine-tuning", "")
    for name, fact in facts.items():
        table.add_row(name, fact)
    console.print(table)
    table = Table("", "check", "measured")
    for check in checks:
        table.add_row("ok" if check.passed else "FAILED", check.claim, check.measured)
    console.print(table)


def draw_losses(pretraining: Sequence[float], fine_tuning: Sequence[float], path: Path) -> None:
    """Writes a PNG of the mean training loss (nats) of every epoch, one curve after the other."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    split = len(pretraining)
    axes.plot(range(1, split + 1), pretraining, label="base, upright digits")
    axes.plot(range(split + 1, split + len(fine_tuning) + 1), fine_tuning, label="adapter, transformed digits")
    axes.set(xlabel="epoch", ylabel="mean training loss (nats)", yscale="log", title="Pretraining, then LoRA")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
