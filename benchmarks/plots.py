"""python -m benchmarks.plots: draws the README's plots from the result files, linear.json and memory.json by default.

linear.png: forward + backward as a ratio to the bare frozen layer, per shape and peer, with the targets as marks.
memory.png: what one layer saves for backward, per shape and candidate, with a step's peak as marks.
inference.png: one layer's forward in eval mode as a ratio to the merged layer over the number of tokens, at r=16 under
CUDA graphs, a panel a shape, with the goals as marks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110
WIDTH = 0.8
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#9c6b4e", "#97bbf5")
GIB = 2**30

Row = dict[str, Any]
# A number for each shape and name.
Bars = dict[tuple[str, str], float]


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """A result file's header and records."""
    content = json.loads(path.read_text())
    return content["header"], content["records"]


def _unique(rows: list[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _bars(axes: Axes, shapes: list[str], names: list[str], heights: Bars) -> Bars:
    """One group of bars for each shape and one bar in it for each name; returns where each bar stands."""
    places: Bars = {}
    width = WIDTH / len(names)
    for i, name in enumerate(names):
        present = [shape for shape in shapes if (shape, name) in heights]
        xs = [shapes.index(shape) - WIDTH / 2 + (i + 0.5) * width for shape in present]
        colour = COLOURS[i % len(COLOURS)]
        axes.bar(xs, [heights[shape, name] for shape in present], width * 0.92, label=name, color=colour, zorder=2)
        places |= {(shape, name): x for shape, x in zip(present, xs, strict=True)}
    axes.set_xticks(range(len(shapes)), shapes)
    axes.grid(axis="y", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    return places


def draw_linear(header: dict[str, str], rows: list[Row]) -> Figure:
    """The first tokens, dtype and rank of the file; a peer of which the file has none there is left out."""
    first = {key: rows[0][key] for key in ("tokens", "dtype", "r")}
    rows = [row for row in rows if all(row[key] == value for key, value in first.items())]
    shapes, names, dropouts = (_unique(rows, key) for key in ("shape", "candidate", "p"))
    figure = Figure(figsize=(10, 3.4 * len(dropouts)), layout="constrained")
    for axes, p in zip(figure.subplots(len(dropouts), squeeze=False)[:, 0], dropouts, strict=True):
        heights: Bars = {}
        aims: Bars = {}
        for row in (row for row in rows if row["p"] == p):
            # Further adapter dtypes of ours come later and have no bar of their own.
            heights.setdefault((row["shape"], row["candidate"]), row["sustained_ratio"])
            if row.get("target") is not None:
                aims.setdefault((row["shape"], row["candidate"]), row["target"])
        places = _bars(axes, shapes, names, heights)
        label = "target"
        for bar, aim in aims.items():
            axes.plot(places[bar], aim, marker="_", markersize=22, color="black", linestyle="", zorder=3, label=label)
            label = "_nolegend_"
        axes.axhline(1, color="black", linewidth=1, zorder=3)
        lowest = min(1.0, *heights.values())
        axes.set_ylim(bottom=lowest - 0.02)
        axes.set_ylabel("ratio to the bare layer")
        axes.set_title(f"dropout {p:g}", loc="left", fontsize=10)
        axes.legend(frameon=False, ncols=len(names) + 1, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    what = f"Forward + backward of one LoRA layer, {first['dtype']}, {first['tokens']} tokens, r={first['r']}"
    figure.suptitle(f"{what}\n{header['gpu']}, torch {header['torch']}, {header['commit']}", fontsize=10)
    return figure


def draw_memory(header: dict[str, str], rows: list[Row]) -> Figure:
    """x, which layers share, is the pale foot of each bar."""
    shapes, names, dropouts = (_unique(rows, key) for key in ("shape", "candidate", "p"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, p in zip(figure.subplots(1, len(dropouts), squeeze=False, sharey=True)[0], dropouts, strict=True):
        of_p = {(row["shape"], row["candidate"]): row for row in rows if row["p"] == p}
        heights = {bar: (row["x_bytes"] + row["saved_bytes"]) / GIB for bar, row in of_p.items()}
        places = _bars(axes, shapes, names, heights)
        width = WIDTH / len(names) * 0.92
        feet = [row["x_bytes"] / GIB for row in of_p.values()]
        axes.bar([places[bar] for bar in of_p], feet, width, color="white", alpha=0.6, zorder=3)
        peaks = {places[bar]: row["peak_bytes"] / GIB for bar, row in of_p.items() if "peak_bytes" in row}
        if peaks:
            axes.plot(list(peaks), list(peaks.values()), "k_", markersize=14, zorder=4, label="peak of a step")
        axes.set_title(f"dropout {p:g}", loc="left", fontsize=10)
    figure.axes[0].set_ylabel("GiB saved for backward (pale: x itself)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    what = f"Activation memory of one layer, bfloat16, {rows[0]['tokens']} tokens, r=16"
    figure.suptitle(f"{what}\n{header['gpu']}, torch {header['torch']}, {header['commit']}", fontsize=10)
    return figure


def draw_inference(header: dict[str, str], rows: list[Row]) -> Figure:
    """Of the file's timed rows of Linear those at r=16 and under CUDA graphs; one line for each candidate."""
    rows = [r for r in rows if (r["part"], r["r"], r["mode"]) == ("linear", 16, "CUDA graphs") and "us" in r]
    shapes, names = _unique(rows, "layer"), [name for name in _unique(rows, "candidate") if name != "merged"]
    height = -(-len(shapes) // 2)
    figure = Figure(figsize=(10, 0.8 + 3.2 * height), layout="constrained")
    panels = figure.subplots(height, 2, squeeze=False, sharex=True).flat
    for axes, shape in zip(panels, shapes, strict=False):
        for i, name in enumerate(names):
            line = sorted((r["tokens"], r["ratio"]) for r in rows if (r["layer"], r["candidate"]) == (shape, name))
            options = {"marker": "o", "markersize": 3, "color": COLOURS[i % len(COLOURS)], "label": name}
            axes.plot(*zip(*line, strict=True), zorder=2, **options)
        aims = [(r["tokens"], r["goal"]) for r in rows if r["layer"] == shape and r["goal"] is not None]
        if aims:
            axes.plot(*zip(*aims, strict=True), "k_", markersize=14, label="goal", zorder=3)
        axes.axhline(1, color="black", linewidth=1, zorder=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(_unique(rows, "tokens"), [str(tokens) for tokens in _unique(rows, "tokens")], fontsize=8)
        axes.grid(axis="y", color="#dddddd", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(shape, loc="left", fontsize=10)
    for axes in list(figure.axes)[len(shapes) :]:
        axes.remove()
    for axes in figure.axes:
        axes.set_xlabel("tokens")
        axes.set_ylabel("ratio to the merged layer")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(names) + 1, frameon=False, fontsize=8)
    what = "Forward of one LoRA layer in eval mode, bfloat16, r=16, CUDA graphs, weights from memory"
    figure.suptitle(f"{what}\n{header['gpu']}, torch {header['torch']}, {header['commit']}", fontsize=10)
    return figure


DRAWN = {"linear": draw_linear, "memory": draw_memory, "inference": draw_inference}


def save(folder: Path, kind: str, stem: str) -> None:
    """Draws STEM.png, a plot of this kind, beside STEM.json."""
    target = folder / f"{stem}.png"
    DRAWN[kind](*load(folder / f"{stem}.json")).savefig(target, dpi=DPI)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of both, files and plots"
    )
    parser.add_argument("--only", nargs="+", default=["linear", "memory"], choices=list(DRAWN))
    options = parser.parse_args(arguments)
    for name in options.only:
        save(options.results, name, name)


if __name__ == "__main__":
    main()
