"""Merging an adapter into a model's safetensors files, tensor by tensor, whatever the model's size."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .safetensors_stream import TensorReader, write_header, write_tensor
from .state_merge import MergeReport, check_dtype, merged_dtype, merged_tensor, plan_merge
from .whole import written_whole

_INDEX = ".safetensors.index.json"
# What describes a model beside its weights: copied, so that the result loads as the base does.
_DESCRIPTIONS = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".spm")
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class _Base:
    """A model's files: shards in order, and the index if there is one."""

    shards: tuple[Path, ...]
    index: Path | None
    folder: Path | None


def merge_file(
    base_model_path: str | os.PathLike[str],
    adapter: Adapter,
    output_path: str | os.PathLike[str],
    alpha: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    fan_in_fan_out: bool | None = None,
    on_tensor: Callable[[int], None] = lambda size: None,
) -> MergeReport:
    """`merge_lora_into_state_dict` from files to files; memory is that of the adapter and the largest tensor.

    base_model_path: a safetensors file, a folder with one or with an index of shards, or such an index,
        `*.safetensors.index.json`. output_path: a file for a file; otherwise a new folder, with the same shards and
        index, and copies of the small files that describe the model (config.json, the tokenizer's).
    alpha, device, fan_in_fan_out: as there. dtype: of merged tensors; None is the base's. All others are copied bit
        for bit.
    on_tensor: called with the bytes of each tensor that is done.
    The output appears under its name when it is whole. Raises ValueError as `merge_lora_into_state_dict` does, and for
    files that are not whole, before anything is written; FileExistsError for an output folder that is not empty; and
    OSError if a file cannot be read or written.
    """
    check_dtype(dtype)
    base = _base(base_model_path)
    output_path = Path(output_path)
    if output_path.exists() and any(output_path.samefile(path) for path in (*base.shards, base.folder) if path):
        raise ValueError(f"output_path is {str(output_path)!r}, the base itself; expected another.")
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(shard)) for shard in base.shards]
        tensors = _tensors(readers, base)
        report = _planned(base, tensors, adapter, fan_in_fan_out)
        changed = report.merged.keys() | report.replaced.keys()

        def merged(key: str, tensor: Tensor) -> Tensor:
            return merged_tensor(key, tensor, adapter, report, alpha, device, dtype)

        if base.folder is None:
            with written_whole(output_path) as file:
                _merge_shard(readers[0], file, changed, merged, dtype, on_tensor)
            return report
        with written_whole(output_path, folder=True) as folder:
            for reader, shard in zip(readers, base.shards, strict=True):
                _merge_shard(reader, folder / shard.name, changed, merged, dtype, on_tensor)
            _copy_descriptions(base.folder, folder)
            if base.index is not None:
                _write_index(base.index, folder)
    return report


def merge_file_report(
    base_model_path: str | os.PathLike[str], adapter: Adapter, *, fan_in_fan_out: bool | None = None
) -> MergeReport:
    """What `merge_file` would do; reads headers alone. Raises the same errors."""
    return _planned(_base(base_model_path), base_tensors(base_model_path), adapter, fan_in_fan_out)


def base_tensors(base_model_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """By name, every tensor of a model's files, on the meta device. Raises the errors of `merge_file`."""
    base = _base(base_model_path)
    with ExitStack() as stack:
        return _tensors([stack.enter_context(TensorReader(shard)) for shard in base.shards], base)


def _planned(base: _Base, tensors: Mapping[str, Tensor], adapter: Adapter, fan_in_fan_out: bool | None) -> MergeReport:
    report = plan_merge(tensors, adapter, fan_in_fan_out)
    return replace(report, tied=_tied(tensors, report, _config(base)))


def _config(base: _Base) -> Mapping[str, Any]:
    path = base.folder / "config.json" if base.folder else None
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}; expected an object.")
    return content


def _tied(tensors: Mapping[str, Tensor], report: MergeReport, config: Mapping[str, Any]) -> tuple[str, ...]:
    """`MergeReport.tied`. Embeddings are known by their rows, vocab_size: their names differ from model to model."""
    text = config.get("text_config")
    configs = (config, text if isinstance(text, dict) else {})
    is_tied = any(each.get("tie_word_embeddings") is True for each in configs)
    if not is_tied or any(_is_head(key) for key in tensors):
        return ()
    sizes = [each.get("vocab_size") for each in configs]
    changed = [*report.merged, *(key for key in report.replaced if key not in report.merged)]
    embeddings = [key for key in changed if tensors[key].dim() == 2 and tensors[key].shape[0] in sizes]
    return (*embeddings, *filter(_is_head, (*report.missing, *report.unexpected)))


def _is_head(name: str) -> bool:
    """Whether this is a layer lm_head, or its weight."""
    return f".{name}".removesuffix(".weight").endswith(".lm_head")


def _base(path: str | os.PathLike[str]) -> _Base:
    path = Path(path)
    if path.is_dir():
        indices = sorted(path.glob(f"*{_INDEX}"))
        files = indices or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"{str(path)!r} has {len(files)} safetensors files and no one index; expected a model.")
        if not indices:
            return _Base((files[0],), None, path)
        path = files[0]
    if not path.name.endswith(_INDEX):
        if path.suffix != ".safetensors":
            raise ValueError(f"base_model_path is {str(path)!r}; expected safetensors: a file, a folder or an index.")
        return _Base((path,), None, None)
    names = sorted(set(_weight_map(path).values()))
    for name in names:
        # The output's names are these, and must not lead out of its folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{str(path)!r} names the shard {name!r}; expected a plain name of a safetensors file.")
    return _Base(tuple(path.parent / name for name in names), path, path.parent)


def _weight_map(index: Path) -> dict[str, str]:
    names: dict[str, str] = _index_content(index)["weight_map"]
    return names


def _index_content(index: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        names = content["weight_map"].values()
        valid = bool(names) and all(type(name) is str for name in names) and type(content.get("metadata", {})) is dict
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(f"{str(index)!r} has no weight_map of names; expected an index of safetensors files.")
    return content


def _tensors(readers: Sequence[TensorReader], base: _Base) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for reader, shard in zip(readers, base.shards, strict=True):
        for name, tensor in reader.tensors.items():
            if name in tensors:
                raise ValueError(f"{name!r} is in {where[name]!r} and in {shard.name!r}; expected it once.")
            tensors[name], where[name] = tensor, shard.name
    if base.index is not None:
        expected = _weight_map(base.index)
        for name in sorted(expected.keys() | where.keys()):
            if expected.get(name) != where.get(name):
                raise ValueError(
                    f"{name!r} is in {where.get(name, 'no shard')!r}; expected {expected.get(name, 'none')!r}, as "
                    f"{base.index.name!r} says."
                )
    return tensors


def _merge_shard(
    reader: TensorReader,
    path: Path,
    changed: set[str],
    merged: Callable[[str, Tensor], Tensor],
    dtype: torch.dtype | None,
    on_tensor: Callable[[int], None],
) -> None:
    metas = dict(reader.tensors)
    for key in changed & metas.keys():
        metas[key] = metas[key].to(merged_dtype(metas[key], dtype))
    with path.open("wb") as file:
        for key in write_header(file, metas, reader.metadata):
            if key in changed:
                write_tensor(file, merged(key, reader.read(key)))
            else:
                reader.copy(key, file)
            on_tensor(reader.tensors[key].nbytes)


def _copy_descriptions(base: Path, folder: Path) -> None:
    for file in sorted((*base.iterdir(), *base.glob(f"{_TEMPLATES}/*.jinja"))):
        if file.is_file() and file.suffix in _DESCRIPTIONS and not file.name.endswith(".index.json"):
            copy = folder / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _write_index(index: Path, folder: Path) -> None:
    content = _index_content(index)
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        with TensorReader(path) as reader:
            size += sum(tensor.nbytes for tensor in reader.tensors.values())
    content["metadata"] = {**content.get("metadata", {}), "total_size": size}
    (folder / index.name).write_text(json.dumps(content, indent=2), encoding="utf-8")
