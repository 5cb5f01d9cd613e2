"""The commands on files: merge, convert and inspect."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from .adapter import Adapter
from .adapter_io import check_overwrites_none, read_adapter, write_adapter
from .formats import FORMATS, is_flat
from .merge_file import base_tensors, merge_file, merge_file_report
from .state_merge import MergeReport, base_names, with_slices_of

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_MOST_SHOWN = 10


def add_file_commands(commands: Any, devices: Sequence[str]) -> None:
    """Adds the three commands to argparse's subparsers; each sets `run`, a function from arguments to exit code."""
    merge = commands.add_parser("merge", help="add an adapter to a model's safetensors files")
    merge.add_argument("--base_model_path", required=True, help="a safetensors file, a model's folder, or its index")
    merge.add_argument("--lora_path", required=True, help="the adapter: a file, or PEFT's folder")
    merge.add_argument("--output_path", required=True, help="a file for a file, a new folder for a folder or an index")
    merge.add_argument("--alpha", type=float, default=1.0, help="a factor beside the stored scaling (default: 1)")
    merge.add_argument("--device", choices=devices, default="cpu", help="where weights are summed (default: cpu)")
    merge.add_argument("--dtype", choices=_DTYPES, help="of merged weights (default: as they are in the base)")
    merge.add_argument(
        "--fan_in_fan_out",
        action=argparse.BooleanOptionalAction,
        help="square weights are stored as (in, out), like GPT-2's (default: what PEFT's config says, or they are not)",
    )
    merge.add_argument(
        "--strict", action="store_true", help="fail if a part of the adapter is not in the base, or is for what it ties"
    )
    merge.add_argument("--dry-run", action="store_true", help="print the report, write nothing")
    _add_reading(merge)
    merge.set_defaults(run=failing_in_one_sentence(_merge))

    convert = commands.add_parser("convert", help="write an adapter in another format")
    convert.add_argument("source", help="the adapter: a file, or PEFT's folder")
    convert.add_argument("target", help="a new file, or for peft a new folder")
    convert.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    convert.add_argument("--lora_alpha", type=float, help="for layers whose format stores none")
    convert.add_argument(
        "--embeddings", nargs="+", default=[], metavar="NAME", help="loralib layers that are embeddings"
    )
    convert.add_argument("--base_model_path", help="the model whose names kohya's names with underscores stand for")
    _add_reading(convert)
    convert.set_defaults(run=failing_in_one_sentence(_convert))

    inspect = commands.add_parser("inspect", help="show what an adapter has")
    inspect.add_argument("file", help="the adapter: a file, or PEFT's folder")
    _add_reading(inspect)
    inspect.set_defaults(run=failing_in_one_sentence(_inspect))


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--from", dest="format", choices=FORMATS, help="the adapter's format, where it does not tell")
    command.add_argument(
        "--enable_lora", type=_switches, metavar="1,0,1", help="which slices of loralib's MergedLinear have an adapter"
    )


def failing_in_one_sentence(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, which for an OSError or a ValueError prints one sentence on stderr and returns 2."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except OSError as error:
            _complain(f"{str(error.filename)!r}: {error.strerror}" if error.filename else str(error))
        except ValueError as error:
            _complain(str(error))
        return 2

    return run


def _complain(text: str) -> None:
    print(" ".join(text.split()).removesuffix(".") + ".", file=sys.stderr)


def _read(path: str, arguments: argparse.Namespace) -> Adapter:
    adapter = read_adapter(path, arguments.format)
    return adapter if arguments.enable_lora is None else adapter.with_enable_lora(arguments.enable_lora)


def _merge(arguments: argparse.Namespace) -> int:
    check_overwrites_none(arguments.output_path, arguments.lora_path)
    adapter = _read(arguments.lora_path, arguments)
    report = merge_file_report(arguments.base_model_path, adapter, fan_in_fan_out=arguments.fan_in_fan_out)
    _print_report(report, adapter, arguments.alpha)
    if arguments.strict and (report.missing or report.unexpected):
        raise ValueError("A part of the adapter is not in the base, which --strict forbids.")
    if arguments.strict and report.tied:
        raise ValueError("The base ties its output head to embeddings that the merge changes, which --strict forbids.")
    if arguments.dry_run:
        return 0
    size = sum(tensor.nbytes for tensor in base_tensors(arguments.base_model_path).values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="merge", disable=None) as bar:
        merge_file(
            arguments.base_model_path,
            adapter,
            arguments.output_path,
            arguments.alpha,
            arguments.device,
            getattr(torch, arguments.dtype) if arguments.dtype else None,
            fan_in_fan_out=arguments.fan_in_fan_out,
            on_tensor=bar.update,
        )
    _print("written", arguments.output_path)
    return 0


def _print_report(report: MergeReport, adapter: Adapter, alpha: float) -> None:
    _print("format", adapter.format)
    stored = "not stored, so --alpha alone" if report.unscaled else f"{_scalings(adapter)}, times --alpha"
    _print("scaling", f"{stored} {alpha:g}")
    _print("merged", f"{len(report.merged)} of {len(adapter.layers)} layers, {len(report.transposed)} transposed")
    _print_names("replaced", report.replaced)
    _print_names("missing", report.missing)
    _print_names("unexpected", report.unexpected)
    _print_names("tied", report.tied, "; the base has one weight for embeddings and output head")
    if report.square:
        taken = "(in, out)" if report.square[0] in report.transposed else "(out, in)"
        why = "torch's layout" if adapter.fan_in_fan_out is None else "as PEFT's config says"
        _print("square", f"{len(report.square)} taken as {taken}, {why}; --[no-]fan_in_fan_out says otherwise")


def _print(title: str, text: str) -> None:
    print(f"{title:<15}{text}")


def _print_names(title: str, names: Iterable[str], why: str = "") -> None:
    names = list(names)
    if names:
        left = f", and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
        _print(title, f"{len(names)}: {', '.join(names[:_MOST_SHOWN])}{left}{why}")


def _convert(arguments: argparse.Namespace) -> int:
    check_overwrites_none(arguments.target, *filter(None, (arguments.source, arguments.base_model_path)))
    adapter = _read(arguments.source, arguments)
    if arguments.lora_alpha is not None:
        adapter = adapter.with_alpha(arguments.lora_alpha)
    adapter = adapter.with_embeddings(arguments.embeddings)
    if arguments.base_model_path is not None:
        base = base_tensors(arguments.base_model_path)
        names = base_names(base, adapter)
        absent = [path for path in adapter.layers if path not in names]
        if absent:
            raise ValueError(
                f"{absent[0]!r} and {len(absent) - 1} other layers are not in the base; expected them all."
            )
        adapter = with_slices_of(base, adapter).with_names(names)
    elif arguments.to != "kohya" and any(is_flat(path) for path in adapter.layers):
        raise ValueError("kohya's names have underscores for dots; expected --base_model_path, which has the dots.")
    notes = write_adapter(adapter, arguments.target, arguments.to)
    _print("written", f"{arguments.target}, {len(adapter.layers)} layers from {adapter.format} to {arguments.to}")
    for note in notes:
        _print("note", note)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    adapter = _read(arguments.file, arguments)
    layers = adapter.layers
    tensors = [tensor for layer in layers.values() for tensor in (layer.lora_A, layer.lora_B)]
    alphas = Counter("not stored" if layer.lora_alpha is None else f"{layer.lora_alpha:g}" for layer in layers.values())
    rows = {
        "format": adapter.format,
        "layers": str(len(layers)),
        "kinds": _counted(Counter(layer.kind for layer in layers.values())),
        "r": _counted(Counter(str(layer.r) for layer in layers.values())),
        "lora_alpha": _counted(alphas),
        "scaling": _scalings(adapter),
        "dtypes": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in adapter.dtypes)),
        "parameters": f"{sum(tensor.numel() for tensor in tensors):,}",
        "size": f"{sum(tensor.nbytes for tensor in tensors):,} bytes",
        "targets": _counted(Counter(path.rpartition(".")[2] or "the model" for path in layers)),
    }
    layouts = [adapter.stored_transposed(path) for path in layers]
    if any(transposed is not None for transposed in layouts):
        rows["fan_in_fan_out"] = _counted(Counter(str(each) for each in layouts if each is not None))
    for title, text in rows.items():
        _print(title, text)
    _print_names("others", adapter.others)
    return 0


def _scalings(adapter: Adapter) -> str:
    return _counted(
        Counter("not stored" if layer.scaling is None else f"{layer.scaling:g}" for layer in adapter.layers.values())
    )


def _counted(counts: Counter[str]) -> str:
    """The keys, most common first, with how often each occurs if there are several."""
    shown = [f"{key} ({count})" if len(counts) > 1 else key for key, count in counts.most_common(_MOST_SHOWN)]
    return ", ".join(shown) + (f", and {len(counts) - _MOST_SHOWN} more" if len(counts) > _MOST_SHOWN else "")


def _switches(text: str) -> tuple[bool, ...]:
    values = {"1": True, "true": True, "0": False, "false": False}
    try:
        return tuple(values[part.strip().lower()] for part in text.split(","))
    except KeyError:
        raise argparse.ArgumentTypeError(
            f"enable_lora is {text!r}; expected 0 or 1 for each slice, as 1,0,1."
        ) from None
