"""What every benchmark has in common beside its clock: its first options, its progress and its result files."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.timing import machine_header, markdown_table

T = TypeVar("T")
RESULTS = Path("benchmarks/results")


class Progress:
    """Prints what is being done, with the seconds since the start, at once."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Also `given`, the options in words; those of a trial on a CPU must name another folder."""
        found = super().parse_args(args, namespace)
        if found.device == "cpu" and found.output == RESULTS:
            self.error(f"--output is {RESULTS}; expected another folder for times of --device cpu.")
        found.given = shlex.join(sys.argv[1:] if args is None else args)
        return found


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take; `name` is the stem of their result files."""
    made = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    made.add_argument("--name", default=name, help="stem of the result files")
    made.add_argument("--commit", help="what to write in the header; default: git describe")
    made.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the code; its times mean nothing"
    )
    return made


def selected(made: argparse.ArgumentParser, only: Sequence[str], named: Mapping[str, T]) -> list[T]:
    """Those whose name holds one of the texts of --only; the parser's error if there are none."""
    found = [thing for name, thing in named.items() if any(text in name for text in only)]
    if not found:
        made.error(f"--only is {' '.join(only)}; expected texts of these: {', '.join(named)}.")
    return found


def header_of(options: argparse.Namespace) -> dict[str, str]:
    """The machine's, and what the run was asked for."""
    return machine_header(options.commit, options.device) | {"options": options.given or "none"}


@dataclass
class Results:
    """One benchmark's outcome: records for machines, and tables and remarks for readers."""

    title: str
    header: dict[str, str]
    records: list[dict[str, Any]] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        self.sections.append(markdown_table(columns, rows))

    def text(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.header.items())
        return "\n\n".join([self.title, facts, *self.sections]) + "\n"

    def write(self, folder: Path, stem: str) -> None:
        """STEM.md, STEM.json with everything, and STEM.csv without the records' lists; prints the first."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.md").write_text(self.text())
        content = {"header": self.header, "records": self.records}
        (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
        flat = [{key: value for key, value in r.items() if not isinstance(value, list)} for r in self.records]
        columns = list(dict.fromkeys(key for record in flat for key in record))
        with (folder / f"{stem}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
        print(self.text(), flush=True)
