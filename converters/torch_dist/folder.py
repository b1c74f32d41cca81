"""A torch_dist checkpoint, opened without torch: where the rows of its tensors lie, whatever ranks wrote them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.engine.sources import allow_files
from megabatch.converters.mapping import elements
from megabatch.converters.regular_files import INDEX_BYTES, open_regular, read_regular
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.torch_dist.archive import StoredTensor, open_tensor
from megabatch.converters.torch_dist.metadata import Chunk, Entry, Stored, load_metadata
from megabatch.errors import ConversionError
from megabatch.values import dataclass

_WHY = "; is this a torch_dist checkpoint?"


class Block(NamedTuple):
    """Rows and columns of a cell that lie densely in one file."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    path: Path
    offset: int
    """First byte."""


@dataclass(frozen=True, slots=True)
class _Part:
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
        self.entries: dict[str, Entry] = load_metadata(
            read_regular(metadata, most=INDEX_BYTES, why=_WHY), place=str(metadata)
        )
        self._files: dict[str, int] = {}
        self._paths = {
            chunk.stored.file: self.path / chunk.stored.file
            for entry in self.entries.values()
            for chunk in entry.chunks
        }
        allow_files(len(self._paths))
        self._opened: dict[Stored, StoredTensor] = {}
        self._cells: dict[tuple[str, int], dict[tuple[int, ...], list[_Part]]] = {}

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other keys."""
        self.entries = {names.get(key, key): entry for key, entry in self.entries.items()}

    def dtype(self, key: str) -> str:
        """safetensors' name of a tensor's dtype. Raises: ConversionError when it has no chunks."""
        entry = self.entries[key]
        if not entry.chunks:
            raise ConversionError(f"{self.path}: {key} has no chunks")
        return self._open_chunk(key, entry.chunks[0].stored, entry.chunks[0].sizes).dtype

    def blocks(self, key: str, lead: tuple[int, ...]) -> list[Block]:
        """The parts of one cell in the order of their rows, which give every element of it once.

        Raises: ConversionError when chunks leave a hole or overlap, or differ in dtype.
        """
        place = f"{self.path}: {key} {list(lead)}"
        size = self.entries[key].size[len(lead) :]
        dtype = self.dtype(key)
        unit = elements(size[2:]) * ITEMSIZE[dtype]
        found = []
        for part in self._parts(key, len(lead)).get(lead, []):
            tensor = self._open_chunk(key, part.stored, part.sizes)
            if tensor.dtype != dtype:
                raise ConversionError(f"{place}: chunks are {dtype} and {tensor.dtype}")
            bytes_ = (part.rows[1] - part.rows[0]) * (part.cols[1] - part.cols[0]) * unit
            offset = part.stored.offset + tensor.offset + part.place * bytes_
            found.append(Block(part.rows, part.cols, self._paths[part.stored.file], offset))
        found.sort(key=lambda block: (block.rows, block.cols))
        check_tiling(found, (size[0], size[1] if len(size) > 1 else 1), place)
        return found

    def _parts(self, key: str, leading: int) -> dict[tuple[int, ...], list[_Part]]:
        if (key, leading) not in self._cells:
            cells: dict[tuple[int, ...], list[_Part]] = {}
            entry = self.entries[key]
            for chunk in entry.chunks:
                for lead, part in _split(chunk, entry.size, leading, f"{self.path}: {key}"):
                    cells.setdefault(lead, []).append(part)
            self._cells[key, leading] = cells
        return self._cells[key, leading]

    def _open_chunk(self, key: str, stored: Stored, sizes: tuple[int, ...]) -> StoredTensor:
        if stored in self._opened:
            return self._opened[stored]
        place = f"{self.path / stored.file}: {key} at byte {stored.offset}"
        tensor = open_tensor(self._file(stored.file), stored.offset, stored.length, place=place)
        if tensor.shape != sizes and tensor.shape != tuple(size for size in sizes if size != 1):
            raise ConversionError(f"{place}: shape {list(tensor.shape)}, .metadata gives {list(sizes)}")
        if tensor.dtype != (self.entries[key].dtype or tensor.dtype):
            raise ConversionError(f"{place}: is {tensor.dtype}, .metadata gives {self.entries[key].dtype}")
        self._opened[stored] = tensor
        return tensor

    def _file(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = open_regular(self.path / name)
        return self._files[name]

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _split(chunk: Chunk, size: tuple[int, ...], leading: int, place: str) -> Iterator[tuple[tuple[int, ...], _Part]]:
    """A chunk's parts, one for each leading index that it covers."""
    offsets, sizes = chunk.offsets, chunk.sizes
    fits = len(offsets) == len(sizes) == len(size) > leading and all(
        at + count <= whole for at, count, whole in zip(offsets, sizes, size, strict=True)
    )
    if not fits or sizes[leading + 2 :] != size[leading + 2 :]:
        raise ConversionError(f"{place} {list(size)}: a chunk at {offsets} of {sizes} cannot be read as rows")
    rows = (offsets[leading], offsets[leading] + sizes[leading])
    cols = (offsets[leading + 1], offsets[leading + 1] + sizes[leading + 1]) if len(sizes) > leading + 1 else (0, 1)
    ranges = [range(at, at + count) for at, count in zip(offsets[:leading], sizes, strict=False)]
    for place_in_chunk, lead in enumerate(itertools.product(*ranges)):
        yield lead, _Part(rows, cols, chunk.stored, sizes, place_in_chunk)


def check_tiling(blocks: list[Block], size: tuple[int, int], place: str) -> None:
    """Checks that sorted blocks cover each row and column once.

    Raises: ConversionError naming the first rows that they do not.
    """
    edges = sorted({0, size[0], *(edge for block in blocks for edge in block.rows)})
    for first, last in itertools.pairwise(edges):
        column = 0
        for block in blocks:
            if block.rows[0] <= first and last <= block.rows[1]:
                column = block.cols[1] if block.cols[0] == column else -1
        if column != size[1] or last > size[0]:
            word = "overlap in" if sum(map(_area, blocks)) > size[0] * size[1] else "leave a gap in"
            raise ConversionError(f"{place}: chunks {word} rows {first} to {last}")


def _area(block: Block) -> int:
    return (block.rows[1] - block.rows[0]) * (block.cols[1] - block.cols[0])


def _check_format(path: Path) -> None:
    try:
        format_ = json.loads(read_regular(path, why=_WHY))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path}: names no sharded_backend") from error
    if format_ != "torch_dist":
        raise ConversionError(f"{path}: sharded_backend is {format_!r}; only torch_dist can be read")
