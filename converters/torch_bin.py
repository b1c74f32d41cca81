"""`pytorch_model.bin`, whole or in shards, as byte ranges of its files: pickles are read as data and call nothing.

torch.save writes an uncompressed zip (since torch 1.6) whose `data.pkl` names the tensors, and whose members are their
storages. A tensor is a range of a file when its numbers lie in order without gaps; several may share a storage.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.mapping import elements
from megabatch.converters.regular_files import INDEX_BYTES, open_regular, read_regular
from megabatch.converters.safetensors_io.folder import HfFolder, has_safetensors
from megabatch.converters.safetensors_io.header import ITEMSIZE, Extent, parse_object
from megabatch.converters.tensor_names import require_plain
from megabatch.converters.torch_dist.archive import STORAGES, check_contiguous
from megabatch.converters.torch_dist.pickle_codec import Persistent, Recorded, load
from megabatch.converters.torch_dist.zip_directory import ZipDirectory
from megabatch.errors import ConversionError

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LARGEST_PICKLE = 64 << 20
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save's first format begin."""
_DTYPES = {storage: dtype for dtype, storage in STORAGES.items()} | {
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_WRAPPERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")


class BinFolder(HfFolder):
    """A folder whose tensors are in `pytorch_model.bin`, or in the files of its index."""

    def _locate(self) -> dict[str, tuple[Path, Extent]]:
        if (self.path / SINGLE).is_file():
            return {name: (self.path / SINGLE, extent) for name, extent in read_bin(self.path / SINGLE).items()}
        if (self.path / INDEX).is_file():
            return _sharded(self.path)
        return HfFolder._locate(self)


def open_folder(path: str | os.PathLike[str], *, accept_bin: bool) -> HfFolder:
    """A folder of safetensors, or one that has only pickled weights where that is accepted."""
    folder = Path(path)
    return BinFolder(folder) if accept_bin and not has_safetensors(folder) else HfFolder(folder)


def _sharded(folder: Path) -> dict[str, tuple[Path, Extent]]:
    index = folder / INDEX
    weight_map = parse_object(read_regular(index, most=INDEX_BYTES), index, what="index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_plain_name, weight_map.values())):
        raise ConversionError(f"{index}: its weight_map does not map names to files of this folder")
    where: dict[str, tuple[Path, Extent]] = {}
    for file in dict.fromkeys(weight_map.values()):
        for name, extent in read_bin(folder / file).items():
            if weight_map.get(name) != file:
                raise ConversionError(f"{folder / file}: has {name}, which {INDEX} puts in {weight_map.get(name)}")
            where[name] = (folder / file, extent)
    for name in (name for name in weight_map if name not in where):
        raise ConversionError(f"{folder / weight_map[name]}: {name} is not in it, though {INDEX} says so")
    return where


def _is_plain_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file and file.endswith(".bin")


def read_bin(path: Path) -> dict[str, Extent]:
    """The tensors of one file. Raises: ConversionError naming file and tensor."""
    file = open_regular(path)
    try:
        return _read(file, path)
    except (struct.error, KeyError, ValueError, StopIteration, OSError) as error:
        raise ConversionError(f"{path}: no file of torch.save: {type(error).__name__} {error}") from error
    finally:
        os.close(file)


def _read(file: int, path: Path) -> dict[str, Extent]:
    if os.pread(file, len(_OLD), 0) == _OLD:
        raise ConversionError(
            f"{path}: saved in the format before torch 1.6, which has no byte ranges; load it with "
            "torch.load(..., weights_only=True) and save it again"
        )
    archive = ZipDirectory(file, 0, os.fstat(file).st_size, largest=_LARGEST_PICKLE)
    root = next(iter(archive.members)).split("/")[0]
    if f"{root}/byteorder" in archive.members and archive.read(f"{root}/byteorder") != b"little":
        raise ConversionError(f"{path}: saved on a big-endian machine")
    state = load(archive.read(f"{root}/data.pkl"), place=f"{path}: data.pkl")
    if not isinstance(state, Mapping) or not state:
        raise ConversionError(f"{path}: holds {_what(state)}, not tensors by name")
    return {_name(name, path): _extent(value, archive, root, f"{path}: {name}") for name, value in state.items()}


def _name(name: object, path: Path) -> str:
    if not isinstance(name, str):
        raise ConversionError(f"{path}: has a tensor whose name is {_what(name)}")
    return require_plain(name)


def _extent(value: Any, archive: ZipDirectory, root: str, place: str) -> Extent:
    """Where a tensor lies."""
    while isinstance(value, Recorded) and type(value).__name__ in _WRAPPERS and value.args:
        value = value.args[0]
    if _what(value) != "what torch._utils._rebuild_tensor_v2 would have made":
        raise ConversionError(f"{place}: is {_what(value)}, not a plain tensor")
    try:
        storage, skip, shape, strides = value.args[:4]
        _, kind, key, *_ = storage.key if isinstance(storage, Persistent) else ()
        dtype = _DTYPES.get(getattr(kind, "__name__", ""))
        if dtype is None:
            raise ValueError(f"numbers of {_what(kind)}")
        check_contiguous(tuple(shape), tuple(strides))
        member = f"{root}/data/{key}"
        size = elements(tuple(shape)) * ITEMSIZE[dtype]
        if type(skip) is not int or skip < 0 or skip * ITEMSIZE[dtype] + size > archive.members[member].size:
            raise ValueError(f"{list(shape)} {dtype} does not fit its storage")
        if any(value.args[6:7]):
            raise ValueError(f"a view with {value.args[6]!r}")
        return Extent(TensorInfo(dtype, tuple(shape)), archive.data_offset(member) + skip * ITEMSIZE[dtype], size)
    except (TypeError, ValueError, KeyError, AttributeError, struct.error) as error:
        raise ConversionError(f"{place}: cannot be read as a range of bytes: {error}") from error


def _what(value: object) -> str:
    """A short description of an unpickled value."""
    if isinstance(value, type) and issubclass(value, Recorded):
        return f"{value.module}.{value.__name__}"
    if isinstance(value, Recorded):
        return f"what {value.module}.{type(value).__name__} would have made"
    return type(value).__name__
