"""Safetensors files tensor by tensor, in memory of the largest tensor's size.

safetensors itself maps a whole file privately to read it, which a limit on memory forbids for a file that is larger,
and takes all tensors at once to write it. The format is its own: 8 bytes of the header's size, the header in JSON, and
the tensors' bytes, little-endian, one after another (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The library's own limit.
_LARGEST_HEADER = 100_000_000
_COPIED_AT_ONCE = 1 << 22


class TensorReader:
    """The tensors of one safetensors file; a context manager.

    tensors: by name, tensors on the meta device, in the order of their bytes. metadata: the header's texts.
    Raises ValueError if the file is not whole or no safetensors file, and OSError if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  (closed by __exit__)
        try:
            self._read_header()
        # A broken or hostile header; RuntimeError is torch's word for a shape that cannot be.
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
            self._file.close()
            raise ValueError(f"{os.fspath(path)!r} is no whole safetensors file ({error}).") from error

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        meta = self.tensors[name]
        content = bytearray(meta.nbytes)
        self._file.seek(self._offsets[name])
        if self._file.readinto(content) != len(content):
            raise ValueError(f"{self._file.name!r} ended within {name!r}; expected the whole file.")
        if not content:
            return torch.empty(meta.shape, dtype=meta.dtype)
        return torch.frombuffer(content, dtype=meta.dtype).view(meta.shape)

    def copy(self, name: str, to: BinaryIO) -> None:
        """Writes the tensor's bytes to a file, a part at a time."""
        self._file.seek(self._offsets[name])
        left = self.tensors[name].nbytes
        while left:
            part = self._file.read(min(left, _COPIED_AT_ONCE))
            if not part:
                raise ValueError(f"{self._file.name!r} ended within {name!r}; expected the whole file.")
            to.write(part)
            left -= len(part)

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError("its header is larger than the file")
        header = json.loads(self._file.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = {} if metadata is None else metadata
        if not all(type(text) is str for text in self.metadata.values()):
            raise ValueError("its metadata are not texts")
        self.tensors: dict[str, Tensor] = {}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            meta = _meta(entry)
            if entry["data_offsets"] != [end, end + meta.nbytes]:
                raise ValueError(f"{name!r} has the bytes {entry['data_offsets']}, expected {[end, end + meta.nbytes]}")
            self.tensors[name], self._offsets[name] = meta, 8 + length + end
            end += meta.nbytes
        if end != size - 8 - length:
            raise ValueError(f"it has {size - 8 - length} bytes of tensors, expected {end}")


def _meta(entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"shape {shape} is none")
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def write_header(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[str]:
    """Writes the header for these tensors, of which only dtypes and shapes count.

    Returns the names in the order in which their bytes must follow: by falling size of an element, so that each tensor
    begins at a multiple of it, as safetensors needs to read them.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    content = json.dumps(header, separators=(",", ":")).encode("ascii")
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)
    return names


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Writes a tensor's bytes, a part at a time."""
    for part in tensor.reshape(-1).split(_COPIED_AT_ONCE // tensor.element_size()):
        content = bytearray(part.nbytes)
        if content:
            torch.frombuffer(content, dtype=part.dtype).copy_(part)
        file.write(content)
