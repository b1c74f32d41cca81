"""A torch_dist checkpoint, opened without torch: rows of any of its tensors, whatever ranks wrote them."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from megabatch.converters.mapping import elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.shards import interleave
from megabatch.converters.torch_dist.archive import StoredTensor, open_tensor
from megabatch.converters.torch_dist.metadata import Chunk, Entry, Stored, load_metadata
from megabatch.errors import ConversionError


@dataclass(frozen=True, slots=True)
class _Block:
    """The part of a chunk that lies in one cell: rows and columns of the cell."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    stored: Stored
    sizes: tuple[int, ...]
    place: int
    """Number of this block among the blocks of its chunk."""


class TorchDistFolder:
    """The tensors of a torch_dist folder by key.

    A *cell* of a tensor is what remains when its leading dimensions (layer, expert) are fixed.
    Raises: ConversionError naming the file, for whatever is missing or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _check_format(self.path / "metadata.json")
        metadata = self.path / ".metadata"
        self.entries: dict[str, Entry] = load_metadata(_read(metadata), place=str(metadata))
        self._files: dict[str, int] = {}
        self._opened: dict[Stored, StoredTensor] = {}
        self._cells: dict[tuple[str, int], dict[tuple[int, ...], list[_Block]]] = {}
        self._lock = threading.Lock()

    def dtype(self, key: str) -> str:
        """safetensors' name of a tensor's dtype. Raises: ConversionError when it has no chunks."""
        entry = self.entries[key]
        if not entry.chunks:
            raise ConversionError(f"{self.path}: {key} has no chunks")
        return self._open_chunk(key, entry.chunks[0].stored, entry.chunks[0].sizes).dtype

    def read_rows(self, key: str, lead: tuple[int, ...], rows: tuple[int, int], into: memoryview) -> None:
        """Fills `into` with whole rows of one cell.

        Raises: ConversionError when chunks leave a hole or overlap.
        """
        size = self.entries[key].size[len(lead) :]
        unit = elements(size[2:]) * ITEMSIZE[self.dtype(key)]
        row_bytes = unit * (size[1] if len(size) > 1 else 1)
        filled = 0
        for block in self._blocks(key, len(lead)).get(lead, []):
            first, last = max(rows[0], block.rows[0]), min(rows[1], block.rows[1])
            if first >= last:
                continue
            width = (block.cols[1] - block.cols[0]) * unit
            height = block.rows[1] - block.rows[0]
            tensor = self._open_chunk(key, block.stored, block.sizes)
            start = block.stored.offset + tensor.offset + (block.place * height + first - block.rows[0]) * width
            target = into[(first - rows[0]) * row_bytes : (last - rows[0]) * row_bytes]
            self._fill(block.stored.file, target, start, block.cols[0] * unit, width, row_bytes)
            filled += (last - first) * width
        if filled != into.nbytes:
            word = "leave a hole in" if filled < into.nbytes else "overlap in"
            raise ConversionError(f"{self.path}: chunks {word} rows {rows[0]} to {rows[1]} of {key} {list(lead)}")

    def _fill(self, file: str, target: memoryview, start: int, offset: int, width: int, stride: int) -> None:  # noqa: PLR0917
        if width == stride:
            self._pread(file, target, start)
            return
        part = memoryview(bytearray(target.nbytes // stride * width))
        self._pread(file, part, start)
        interleave(target, part, offset=offset, width=width, stride=stride)

    def _blocks(self, key: str, leading: int) -> dict[tuple[int, ...], list[_Block]]:
        with self._lock:
            if (key, leading) not in self._cells:
                cells: dict[tuple[int, ...], list[_Block]] = {}
                for chunk in self.entries[key].chunks:
                    for lead, block in _split(chunk, leading, f"{self.path}: {key}"):
                        cells.setdefault(lead, []).append(block)
                self._cells[key, leading] = cells
            return self._cells[key, leading]

    def _open_chunk(self, key: str, stored: Stored, sizes: tuple[int, ...]) -> StoredTensor:
        with self._lock:
            known = self._opened.get(stored)
        if known is not None:
            return known
        place = f"{self.path / stored.file}: {key} at byte {stored.offset}"
        with open(self._file(stored.file), "rb", closefd=False, buffering=0) as raw:
            window = io.BufferedReader(_Window(raw.fileno(), stored.offset, stored.length), 1 << 12)
            tensor = open_tensor(window, place=place)
        if tensor.shape != sizes and tensor.shape != tuple(size for size in sizes if size != 1):
            raise ConversionError(f"{place}: shape {list(tensor.shape)}, .metadata gives {list(sizes)}")
        with self._lock:
            self._opened[stored] = tensor
        return tensor

    def _file(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                try:
                    self._files[name] = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise ConversionError(f"{self.path / name}: cannot be read: {error.strerror}") from error
            return self._files[name]

    def _pread(self, name: str, into: memoryview, offset: int) -> None:
        file = self._file(name)
        while into.nbytes:
            try:
                count = os.preadv(file, [into], offset)
            except OSError as error:
                raise ConversionError(f"{self.path / name}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise ConversionError(f"{self.path / name}: truncated at byte {offset}")
            into, offset = into[count:], offset + count

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _split(chunk: Chunk, leading: int, place: str) -> Iterator[tuple[tuple[int, ...], _Block]]:
    """A chunk's blocks, one for each leading index that it covers."""
    inner, sizes = chunk.offsets[leading:], chunk.sizes[leading:]
    if not sizes or any(inner[2:]) or len(inner) != len(sizes):
        raise ConversionError(f"{place}: a chunk at {chunk.offsets} of {chunk.sizes} cannot be read as rows")
    rows = (inner[0], inner[0] + sizes[0])
    cols = (inner[1], inner[1] + sizes[1]) if len(sizes) > 1 else (0, 1)
    ranges = [range(at, at + size) for at, size in zip(chunk.offsets[:leading], chunk.sizes, strict=False)]
    for place_in_chunk, lead in enumerate(product(*ranges)):
        yield lead, _Block(rows, cols, chunk.stored, chunk.sizes, place_in_chunk)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), max(0, self._length - self._at))
        got = os.preadv(self._file, [memoryview(buffer)[:count]], self._start + self._at) if count else 0
        self._at += got
        return got


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}; is this a torch_dist checkpoint?") from error


def _check_format(path: Path) -> None:
    try:
        format_ = json.loads(_read(path))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path}: names no sharded_backend") from error
    if format_ != "torch_dist":
        raise ConversionError(f"{path}: sharded_backend is {format_!r}; only torch_dist can be read")
