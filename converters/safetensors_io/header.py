"""The header of a safetensors file: eight bytes of length, JSON, then the tensors' bytes without holes.

https://github.com/safetensors/safetensors#format
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.regular_files import open_regular
from megabatch.converters.tensor_names import require_plain
from megabatch.errors import ConversionError
from megabatch.values import dataclass

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element."""

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000
_MAX_RANK = 16
_ALIGN = 8


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor inside one file."""

    info: TensorInfo
    start: int
    """Absolute offset of its first byte in the file."""
    size: int
    """Bytes."""


def tensor_bytes(info: TensorInfo) -> int:
    """Size of a tensor in bytes."""
    return math.prod(info.shape) * ITEMSIZE[info.dtype]


def build_header(entries: Mapping[str, TensorInfo], *, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Extent]]:
    """The first bytes of a file and where each tensor will lie, in the order given.

    The tensors start at a multiple of 8 bytes, as the format recommends.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in entries.items():
        if info.dtype not in ITEMSIZE:
            raise ConversionError(f"{name}: dtype {info.dtype} is unknown; known are {', '.join(ITEMSIZE)}")
        end = position + tensor_bytes(info)
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    base = _LENGTH.size + len(text)
    extents = {
        name: Extent(info, base + header[name]["data_offsets"][0], tensor_bytes(info))
        for name, info in entries.items()
    }
    return _LENGTH.pack(len(text)) + text, extents


def read_header(path: Path) -> dict[str, Extent]:
    """The tensors of a file, in the order of their bytes.

    Raises: ConversionError naming the file, for anything that the format does not allow.
    """
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = _header_text(file.read(_LENGTH.size), size, path)
            raw = file.read(text)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) != text:
        raise ConversionError(f"{path}: truncated inside its header")
    header = parse_object(raw, path, what="header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConversionError(f"{path}: __metadata__ must map names to strings")
    base = _LENGTH.size + text
    extents = {name: _extent(name, entry, base, path) for name, entry in header.items()}
    ordered = dict(sorted(extents.items(), key=lambda item: (item[1].start, item[1].size)))
    _check_contiguous(ordered, base, size, path)
    return ordered


def _header_text(prefix: bytes, size: int, path: Path) -> int:
    """Length of the JSON text."""
    if len(prefix) < _LENGTH.size:
        raise ConversionError(f"{path}: {size} bytes are too few for a safetensors file; download or copy it again")
    (length,) = _LENGTH.unpack(prefix)
    if not 2 <= length <= _MAX_HEADER or _LENGTH.size + length > size:
        raise ConversionError(f"{path}: header length {length} is not possible in a file of {size} bytes")
    return int(length)


def parse_object(raw: bytes, path: Path, *, what: str) -> dict[str, Any]:
    """A JSON object that names nothing twice. Raises: ConversionError naming the file."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: {what} must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name} occurs twice")
        name.encode()  # a lone surrogate is a ValueError too
        require_plain(name)
        result[name] = value
    return result


_shared_info = functools.lru_cache(1 << 12)(TensorInfo)
"""Tensors of a large model have few shapes: one object for each saves a tenth of the memory of planning."""


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _extent(name: str, entry: object, base: int, path: Path) -> Extent:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{path}: {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ConversionError(f"{path}: {name} has unknown dtype {dtype!r}; known are {', '.join(ITEMSIZE)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise ConversionError(f"{path}: {name} has no valid shape: {str(shape)[:100]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ConversionError(f"{path}: {name} has no valid data_offsets: {str(offsets)[:100]}")
    info = _shared_info(dtype, tuple(shape))
    start, end = offsets
    if end - start != tensor_bytes(info):
        raise ConversionError(
            f"{path}: {name} {shape} {dtype} needs {tensor_bytes(info)} bytes, its data_offsets give {end - start}"
        )
    return Extent(info, base + start, end - start)


def _check_contiguous(extents: Mapping[str, Extent], base: int, size: int, path: Path) -> None:
    """The tensors' bytes follow one another and fill the file."""
    position = base
    for name, extent in extents.items():
        if extent.start != position:
            word = "there is a gap before" if extent.start > position else "other tensors overlap"
            raise ConversionError(f"{path}: {word} {name} at byte {extent.start - base} of the data")
        position += extent.size
    if position != size:
        word = "truncated" if size < position else "too long"
        raise ConversionError(f"{path}: {word}: its header gives {position} bytes, the file has {size}")


def entries_bytes(entries: Iterable[TensorInfo]) -> int:
    """Bytes of several tensors together."""
    return sum(tensor_bytes(info) for info in entries)
