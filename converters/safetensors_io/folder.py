"""A Hugging Face folder of safetensors, opened strictly and read by byte ranges."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.mapping import elements
from megabatch.converters.regular_files import INDEX_BYTES, open_regular, read_regular
from megabatch.converters.safetensors_io.header import ITEMSIZE, Extent, parse_object, read_header
from megabatch.errors import ConversionError
from megabatch.values import dataclass

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BUFFER_BYTES = 1 << 20
_PIECES, _PIECE_BYTES = 64, 4 << 10
_GAP_BYTES = 16 << 10
"""If two pieces of a column range lie further apart than this, we do not read the bytes between them."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A tensor, or a part of it, in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray


class HfFolder:
    """The tensors of `model.safetensors`, or of the files of `model.safetensors.index.json`.

    Every header is read and checked on opening; data is read on demand. Threads may share it.
    Raises: ConversionError naming the file, for whatever is missing, corrupt or contradictory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._where = self._locate()
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _locate(self) -> dict[str, tuple[Path, Extent]]:
        """Every tensor's file and place in it."""
        return _locate(self.path)

    def under(self, prefix: str, *, but: Sequence[str] = ()) -> None:
        """Gives every tensor but these a name with this prefix."""
        self._where = {name if name in but else prefix + name: place for name, place in self._where.items()}

    @property
    def names(self) -> list[str]:
        """Names of all tensors, file by file in the order of their bytes."""
        return list(self._where)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors with dtype and shape."""
        return {name: extent.info for name, (_, extent) in self._where.items()}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of a tensor. Raises: ConversionError when there is none of this name."""
        return self._find(name)[1].info

    def itemsize(self, name: str) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.info(name).dtype]

    def extent(self, name: str) -> tuple[Path, int, int]:
        """File, offset of the first byte and size in bytes of a tensor."""
        path, extent = self._find(name)
        return path, extent.start, extent.size

    def read(
        self, name: str, *, rows: Range | None = None, cols: Range | None = None, index: int | None = None
    ) -> TensorBytes:
        """A tensor, or `index` of its first dimension, and of that `rows` of dimension 0 and `cols` of dimension 1."""
        info = self.info(name)
        shape = list(info.shape if index is None else info.shape[1:])
        for dim, part in enumerate((rows, cols)):
            if part is not None and dim < len(shape):
                shape[dim] = part[1] - part[0]
        data = bytearray(max(0, elements(tuple(shape))) * ITEMSIZE[info.dtype])
        self.read_into(name, memoryview(data), rows=rows, cols=cols, index=index)
        return TensorBytes(info.dtype, tuple(shape), data)

    def read_into(
        self,
        name: str,
        into: memoryview,
        *,
        rows: Range | None = None,
        cols: Range | None = None,
        index: int | None = None,
    ) -> None:
        """As `read`, into contiguous bytes of exactly the right size."""
        path, extent = self._find(name)
        start, row_bytes, shape = _part_of(name, extent, index)
        first, last = _range(name, rows, shape, 0)
        start += first * row_bytes
        into = into.cast("B")
        if cols is None:
            left, width = 0, row_bytes
        else:
            lo, hi = _range(name, cols, shape, 1)
            unit = row_bytes // shape[1] if shape[1] else 0
            left, width = lo * unit, (hi - lo) * unit
        if into.nbytes != (last - first) * width:
            raise ConversionError(f"{name}: {into.nbytes} bytes given for a part of {(last - first) * width} bytes")
        if into.nbytes == 0:
            return
        if width == row_bytes:
            self._fill(path, into, start)
        elif row_bytes - width > _GAP_BYTES:
            for row in range(last - first):
                self._fill(path, into[row * width : (row + 1) * width], start + row * row_bytes + left)
        else:
            self._fill_through_buffer(path, into, start=start, row_bytes=row_bytes, left=left, width=width)

    def _fill_through_buffer(
        self, path: Path, into: memoryview, *, start: int, row_bytes: int, left: int, width: int
    ) -> None:
        """Whole rows through a bounded buffer: for narrow gaps one large read is faster than many small ones."""
        step = max(1, _BUFFER_BYTES // row_bytes)
        buffer = memoryview(bytearray(step * row_bytes))
        count = into.nbytes // width
        for row in range(0, count, step):
            block = buffer[: min(step, count - row) * row_bytes]
            self._fill(path, block, start + row * row_bytes)
            for at in range(0, block.nbytes, row_bytes):
                target = (row + at // row_bytes) * width
                into[target : target + width] = block[at + left : at + left + width]

    def same(self, name: str, other: str, *, sampled: bool = False) -> bool:
        """Whether two tensors have equal dtype, shape and bytes. Args: sampled: compares 64 pieces that lie evenly
        through them, which tensors that were trained apart differ in."""
        if self.info(name) != self.info(other):
            return False
        (path_a, start_a, size), (path_b, start_b, _) = self.extent(name), self.extent(other)
        most = _PIECE_BYTES if sampled else _BUFFER_BYTES
        a, b = memoryview(bytearray(most)), memoryview(bytearray(most))
        for at in range(0, size, max(most, size // _PIECES) if sampled else most):
            count = min(most, size - at)
            self._fill(path_a, a[:count], start_a + at)
            self._fill(path_b, b[:count], start_b + at)
            if a[:count] != b[:count]:
                return False
        return True

    def _find(self, name: str) -> tuple[Path, Extent]:
        try:
            return self._where[name]
        except KeyError:
            raise ConversionError(f"{self.path}: no tensor {name}") from None

    def _fill(self, path: Path, into: memoryview, offset: int) -> None:
        file = self._open(path)
        try:
            while into.nbytes:
                count = os.preadv(file, [into], offset)
                if count == 0:
                    raise ConversionError(f"{path}: truncated while it was being read, at byte {offset}")
                into = into[count:]
                offset += count
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = open_regular(path)
            return self._files[path]

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _part_of(name: str, extent: Extent, index: int | None) -> tuple[int, int, tuple[int, ...]]:
    """First byte, bytes of a row and shape of a tensor behind its leading index."""
    shape, start = extent.info.shape, extent.start
    itemsize = ITEMSIZE[extent.info.dtype]
    if index is not None:
        if not shape or not 0 <= index < shape[0]:
            raise ConversionError(f"{name} {list(shape)}: there is no leading index {index}")
        shape = shape[1:]
        start += index * elements(shape) * itemsize
    return start, elements(shape[1:]) * itemsize, shape


def _range(name: str, part: Range | None, shape: tuple[int, ...], dim: int) -> Range:
    if part is None:
        return (0, shape[dim]) if dim < len(shape) else (0, 1)
    if dim >= len(shape) or not 0 <= part[0] <= part[1] <= shape[dim]:
        raise ConversionError(f"{name} {list(shape)}: there is no range {part} in dimension {dim}")
    return part


def _locate(folder: Path) -> dict[str, tuple[Path, Extent]]:
    """Every tensor's file and place in it."""
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder of a Hugging Face model")
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        weight_map = _read_index(index)
        if single.is_file() and SINGLE not in weight_map.values():
            raise ConversionError(
                f"{folder}: has both {SINGLE} and {INDEX}, which does not name it; remove the stale one"
            )
        return _sharded(folder, weight_map, index)
    if single.is_file():
        return {name: (single, extent) for name, extent in read_header(single).items()}
    if shards := complete_shards(folder):
        return _without_index(folder, shards)
    raise ConversionError(f"{folder}: {_what_is_there(folder)}")


_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def has_safetensors(folder: Path) -> bool:
    """Whether a folder has weights that `HfFolder` opens."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX)) or bool(complete_shards(folder))


def complete_shards(folder: Path) -> list[str]:
    """The files `NAME-00001-of-00002.safetensors` of a folder without an index, when all that the names count are
    there and no others; their names say that nothing is missing."""
    found = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    numbered = [match for name in found if (match := _SHARD.fullmatch(name))]
    if not numbered or len({match.group(1, 3) for match in numbered}) > 1 or len(numbered) != len(found):
        return []
    return found if [int(match[2]) for match in numbered] == list(range(1, int(numbered[0][3]) + 1)) else []


def _without_index(folder: Path, shards: Sequence[str]) -> dict[str, tuple[Path, Extent]]:
    where: dict[str, tuple[Path, Extent]] = {}
    for file in shards:
        path = folder / file
        for name, extent in read_header(path).items():
            if name in where:
                raise ConversionError(f"{folder}: {name} is in two files, {where[name][0].name} and {file}")
            where[name] = (path, extent)
    return where


def _what_is_there(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    if odd := [path for path in sorted(folder.glob("*.safetensors")) if not path.is_file()]:
        what = "a link that leads nowhere" if odd[0].is_symlink() else "no regular file"
        return f"{odd[0].name} is {what}; put the file there"
    if shards := [name for name in found if name.endswith(".safetensors")]:
        return f"has {', '.join(shards[:4])}, not all shards, and no {INDEX}; complete the download"
    if pickles := [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"has only pickled weights ({pickles[0]}), which are refused by default; --accept_bin reads "
            "pytorch_model.bin as data only, or save them as safetensors with transformers' save_pretrained"
        )
    return f"no {SINGLE} and no {INDEX} in it"


def _read_index(path: Path) -> dict[str, str]:
    weight_map: Any = parse_object(read_regular(path, most=INDEX_BYTES), path, what="index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ConversionError(f"{path}: {name} is in {file!r}, which is not a safetensors file of this folder")
    return weight_map


def _sharded(folder: Path, weight_map: Mapping[str, str], index: Path) -> dict[str, tuple[Path, Extent]]:
    where: dict[str, tuple[Path, Extent]] = {}
    for file in dict.fromkeys(weight_map.values()):
        path = folder / file  # one for all: a large model has a hundred thousand tensors
        for name, extent in _shard_header(path, index).items():
            if name in where:
                raise ConversionError(f"{folder}: {name} is in two files, {where[name][0].name} and {file}")
            if weight_map.get(name) != file:
                raise ConversionError(f"{path}: has {name}, which {INDEX} puts in {weight_map.get(name, 'no file')}")
            where[name] = (path, extent)
    for name in (name for name in weight_map if name not in where):
        raise ConversionError(f"{folder / weight_map[name]}: {name} is not in it, though {INDEX} says so")
    return where


def _shard_header(path: Path, index: Path) -> dict[str, Extent]:
    if not path.is_file():
        raise ConversionError(
            f"{path}: {os.strerror(errno.ENOENT)}, though {index.name} names it; complete the download"
        )
    return read_header(path)
