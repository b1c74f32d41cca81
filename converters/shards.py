"""From Hugging Face rows to a tensor-parallel shard and back: pure arithmetic on a `Mapped`, and two thin readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from megabatch.converters import strided_copy
from megabatch.converters.mapping import Mapped, Piece, elements
from megabatch.errors import ConversionError
from megabatch.values import dataclass

BLOCK_BYTES = 64 << 20
"""Most bytes that `assemble` joins at once."""


@dataclass(frozen=True, slots=True)
class Read:
    """Rows of a Hugging Face tensor and the row of the shard that the first of them goes to."""

    hf: str
    index: int | None
    rows: tuple[int, int]
    cols: tuple[int, int] | None
    """Range of dimension 1 (behind `index`), or None for whole rows."""
    dest_row: int


@dataclass(frozen=True, slots=True)
class Write:
    """Rows of one rank's shard and the place in a Hugging Face tensor that they go to."""

    tp_rank: int
    shard_rows: tuple[int, int]
    hf: str
    index: int | None
    rows: tuple[int, int]
    cols: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class HfRows:
    """Whole rows of a Hugging Face tensor with their bytes."""

    hf: str
    index: int | None
    row_start: int
    data: memoryview


def shard_shape(mapped: Mapped, *, tp_size: int, padded_vocab: int | None = None) -> tuple[int, ...]:
    """Shape of each rank's shard.

    `padded_vocab` is the number of rows of a vocabulary tensor after padding, None for no padding.
    Raises: ConversionError when the tensor cannot be cut into equal parts.
    """
    rows, *tail = mapped.shape
    if mapped.split == "replicated":
        return mapped.shape
    if mapped.split == "row":
        return (rows, _part(mapped, tail[0], tp_size, "columns"), *tail[1:])
    if mapped.split == "vocab":
        return (_part(mapped, _padded(mapped, padded_vocab), tp_size, "padded rows"), *tail)
    parts = (_part(mapped, sum(piece.count for piece in section), tp_size, "rows") for section in mapped.sections)
    return (sum(parts), *tail)


def shard_reads(mapped: Mapped, *, tp_rank: int, tp_size: int, padded_vocab: int | None = None) -> list[Read]:
    """The smallest reads that give one rank its shard; rows of the shard that no read fills are zero (padding).

    Raises: ConversionError when the tensor cannot be cut into equal parts, or is strided: it has no runs of bytes.
    """
    if mapped.strided:
        raise ConversionError(f"{mapped.name} is strided, so not moved by rows, entry {mapped.entry}")
    if mapped.split == "replicated":
        return list(_rows_between(mapped.pieces, 0, mapped.shape[0]))
    if mapped.split == "row":
        width = _part(mapped, mapped.shape[1], tp_size, "columns")
        cols = None if tp_size == 1 else (tp_rank * width, (tp_rank + 1) * width)
        return list(_rows_between(mapped.pieces, 0, mapped.shape[0], cols=cols))
    if mapped.split == "vocab":
        rows = _part(mapped, _padded(mapped, padded_vocab), tp_size, "padded rows")
        return list(_rows_between(mapped.pieces, tp_rank * rows, (tp_rank + 1) * rows))
    reads: list[Read] = []
    dest = 0
    for section in mapped.sections:
        rows = _part(mapped, sum(piece.count for piece in section), tp_size, "rows")
        reads += _rows_between(section, tp_rank * rows, (tp_rank + 1) * rows, dest_row=dest)
        dest += rows
    return reads


def hf_writes(mapped: Mapped, *, tp_size: int, padded_vocab: int | None = None) -> list[Write]:
    """Where each row of the ranks' shards belongs in the Hugging Face tensors: the inverse of `shard_reads`.

    Replicated tensors are taken from rank 0; padding is written nowhere.
    """
    ranks = 1 if mapped.split == "replicated" else tp_size
    return [
        Write(rank, (read.dest_row, read.dest_row + read.rows[1] - read.rows[0]), read.hf, read.index, read.rows,
              read.cols)
        for rank in range(ranks)
        for read in shard_reads(mapped, tp_rank=rank, tp_size=tp_size, padded_vocab=padded_vocab)
    ]  # fmt: skip


def _rows_between(
    pieces: Iterator[Piece] | Sequence[Piece],
    start: int,
    stop: int,
    *,
    dest_row: int = 0,
    cols: tuple[int, int] | None = None,
) -> Iterator[Read]:
    """Reads of rows `start` to `stop` of the concatenated pieces; the first goes to `dest_row`."""
    position = 0
    for piece in pieces:
        first, last = max(start, position), min(stop, position + piece.count)
        if first < last:
            offset = piece.rows[0] - position
            yield Read(piece.hf, piece.index, (first + offset, last + offset), cols, dest_row + first - start)
        position += piece.count


def _part(mapped: Mapped, count: int, parts: int, what: str) -> int:
    if count % parts:
        raise ConversionError(
            f"{mapped.name} {list(mapped.shape)}: {count} {what} do not divide into {parts} tensor-parallel parts, "
            f"entry {mapped.entry}"
        )
    return count // parts


def _padded(mapped: Mapped, padded_vocab: int | None) -> int:
    if padded_vocab is None:
        return mapped.shape[0]
    if padded_vocab < mapped.shape[0]:
        raise ConversionError(f"{mapped.name} {list(mapped.shape)}: {padded_vocab} padded rows are too few")
    return padded_vocab


class Source(Protocol):
    """The interface that `read_shard` needs; `safetensors_io.HfFolder` provides it."""

    def itemsize(self, name: str) -> int: ...

    def read_into(
        self,
        name: str,
        into: memoryview,
        *,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        index: int | None = None,
    ) -> None: ...


def read_shard(
    folder: Source, mapped: Mapped, *, tp_rank: int, tp_size: int, padded_vocab: int | None = None
) -> bytearray:
    """One rank's shard as contiguous bytes, shape `shard_shape`; only that rank's bytes are read, except for a strided
    tensor, which is read whole."""
    _refuse_arithmetic(mapped)
    if mapped.strided:
        return _woven_shard(folder, mapped, tp_rank=tp_rank, tp_size=tp_size)
    shape = shard_shape(mapped, tp_size=tp_size, padded_vocab=padded_vocab)
    row_bytes = elements(shape[1:]) * folder.itemsize(next(mapped.pieces).hf)
    data = bytearray(shape[0] * row_bytes)
    view = memoryview(data)
    for read in shard_reads(mapped, tp_rank=tp_rank, tp_size=tp_size, padded_vocab=padded_vocab):
        count = read.rows[1] - read.rows[0]
        into = view[read.dest_row * row_bytes : (read.dest_row + count) * row_bytes]
        folder.read_into(read.hf, into, rows=read.rows, cols=read.cols, index=read.index)
    return data


def _woven_shard(folder: Source, mapped: Mapped, *, tp_rank: int, tp_size: int) -> bytearray:
    piece = next(mapped.pieces)
    itemsize = folder.itemsize(piece.hf)
    whole = bytearray(elements(mapped.shape) * itemsize)
    folder.read_into(piece.hf, memoryview(whole), index=piece.index)
    data = strided_copy.to_mcore(mapped, whole, itemsize=itemsize)
    return cut(mapped, data, itemsize=itemsize, tp_rank=tp_rank, tp_size=tp_size)


def cut(mapped: Mapped, data: bytearray, *, itemsize: int, tp_rank: int, tp_size: int) -> bytearray:
    """One rank's shard of a whole megatron-core tensor."""
    row_bytes = elements(mapped.shape[1:]) * itemsize
    view = memoryview(data)
    if tp_size == 1 or mapped.split == "replicated":
        return data
    if mapped.split == "row":
        width = _part(mapped, mapped.shape[1], tp_size, "columns") * itemsize
        starts = range(tp_rank * width, len(data), row_bytes)
        return bytearray(b"".join(view[start : start + width] for start in starts))
    parts, position = [], 0
    for section in mapped.sections:
        rows = sum(piece.count for piece in section)
        part = _part(mapped, rows, tp_size, "rows")
        first = position + tp_rank * part
        parts.append(view[first * row_bytes : (first + part) * row_bytes])
        position += rows
    return bytearray(b"".join(parts))


def _refuse_arithmetic(mapped: Mapped) -> None:
    if mapped.offset:
        raise ConversionError(
            f"{mapped.name} differs from {next(mapped.pieces).hf} by {mapped.offset:g}: its bytes cannot be moved as "
            f"they are, entry {mapped.entry}"
        )


def assemble(
    mapped: Mapped,
    shards: Sequence[memoryview | bytearray | bytes],
    *,
    itemsize: int,
    padded_vocab: int | None = None,
) -> Iterator[HfRows]:
    """Hugging Face rows from the bytes of all ranks' shards, in the order of the ranks.

    Replicated tensors need rank 0's only. Nothing is copied, except that a row split is joined in blocks of at most
    `BLOCK_BYTES`, and a strided tensor whole.
    """
    for rows in _assembled(mapped, shards, itemsize=itemsize, padded_vocab=padded_vocab):
        yield rows
        yield from (replace(rows, hf=name) for name in mapped.copies)


def _assembled(
    mapped: Mapped, shards: Sequence[memoryview | bytearray | bytes], *, itemsize: int, padded_vocab: int | None
) -> Iterator[HfRows]:
    _refuse_arithmetic(mapped)
    tp_size = len(shards)
    views = [memoryview(shard).cast("B") for shard in shards]
    shape = shard_shape(mapped, tp_size=tp_size, padded_vocab=padded_vocab)
    row_bytes = elements(shape[1:]) * itemsize
    for rank, view in enumerate(views):
        if view.nbytes != shape[0] * row_bytes and not (mapped.split == "replicated" and rank):
            raise ConversionError(f"{mapped.name}: shard {rank} has {view.nbytes} bytes, {list(shape)} expected")
    if mapped.strided:
        piece = next(mapped.pieces)
        yield HfRows(piece.hf, piece.index, 0, strided_copy.to_hf(mapped, join(mapped, views), itemsize=itemsize))
        return
    if mapped.split == "row" and tp_size > 1:
        yield from _joined(mapped, views, row_bytes)
        return
    for write in hf_writes(mapped, tp_size=tp_size, padded_vocab=padded_vocab):
        start, stop = write.shard_rows
        rows = views[write.tp_rank][start * row_bytes : stop * row_bytes]
        yield HfRows(write.hf, write.index, write.rows[0], rows)


def join(mapped: Mapped, shards: Sequence[memoryview]) -> memoryview:
    """The whole megatron-core tensor of all ranks' shards (not of a vocabulary): the inverse of `cut`."""
    if len(shards) == 1 or mapped.split == "replicated":
        return shards[0]
    if mapped.split == "row":
        row_bytes = shards[0].nbytes // mapped.shape[0]
        block = memoryview(bytearray(row_bytes * len(shards) * mapped.shape[0]))
        for rank, shard in enumerate(shards):
            interleave(block, shard, offset=rank * row_bytes, width=row_bytes, stride=row_bytes * len(shards))
        return block
    position = 0
    parts: list[memoryview] = []
    row_bytes = sum(shard.nbytes for shard in shards) // mapped.shape[0]
    for section in mapped.sections:
        width = sum(piece.count for piece in section) // len(shards) * row_bytes
        parts += (shard[position : position + width] for shard in shards)
        position += width
    return memoryview(bytearray(b"".join(parts)))


def _joined(mapped: Mapped, views: Sequence[memoryview], row_bytes: int) -> Iterator[HfRows]:
    """Rows of a row split: each is the ranks' parts side by side."""
    whole = row_bytes * len(views)
    step = max(1, BLOCK_BYTES // whole)
    position = 0
    for piece in mapped.pieces:
        for first in range(0, piece.count, step):
            count = min(step, piece.count - first)
            start = (position + first) * row_bytes
            block = memoryview(bytearray(count * whole))
            for rank, view in enumerate(views):
                interleave(
                    block,
                    view[start : start + count * row_bytes],
                    offset=rank * row_bytes,
                    width=row_bytes,
                    stride=whole,
                )
            yield HfRows(piece.hf, piece.index, piece.rows[0] + first, block)
        position += piece.count


def interleave(block: memoryview, part: memoryview, *, offset: int, width: int, stride: int) -> None:
    """Copies consecutive rows of `width` bytes to every `stride`th byte of `block`, from `offset` on."""
    at = offset
    for start in range(0, part.nbytes, width):
        block[at : at + width] = part[start : start + width]
        at += stride
