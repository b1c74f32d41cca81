"""Streams live weights to a rollout engine in bounded buckets.

A bucket is one block of bytes with a manifest of its contents and offsets. Tensors are stored whole, in sequence; only
a tensor larger than a bucket is split, and all its buckets but the last hold it alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megabatch.converters.bijection import invert
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.shards import HfRows
from megabatch.rollout.bucket import Bucket, Part
from megabatch.trainer.model.build import Model
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import SAFETENSORS_DTYPES, export

BUCKET_BYTES = 512 << 20
ALIGN = 64
"""Tensors start at multiples of this many bytes, so that they can be used in place."""


def export_buckets(
    model: Model, table: Sequence[Mapped], ranks: Ranks, *, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[Bucket]:
    """The tensors that this rank owns; all ranks' buckets together contain every tensor once.

    Collective: every rank must exhaust the iterator, even if it owns nothing. Memory holds one bucket and the tensor
    being gathered.
    """
    dtype = SAFETENSORS_DTYPES[model.config.params_dtype]
    return fill_buckets(export(model, table, ranks), invert(table), dtype=dtype, room=Room(bucket_bytes))


def fill_buckets(
    tensors: Iterable[tuple[Mapped, Iterator[HfRows]]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    room: Room,
) -> Iterator[Bucket]:
    """Packs rows as `weights.export` yields them. Args: shapes: of the Hugging Face tensors."""
    filling = _Filling(room)
    for mapped, rows in tensors:
        for row in _in_order(mapped, rows):
            part, begins = _part(row, shapes, dtype)
            if begins is not None:
                yield from filling.make_room(begins)
            yield from filling.add(part, row.data)
    yield from filling.flush()


def bare_buckets(
    tensors: Iterable[tuple[Mapped, Iterator[HfRows]]], shapes: Mapping[str, tuple[int, ...]], *, dtype: str
) -> Iterator[Bucket]:
    """Rows as `weights.export` yields them, each as a bucket of its own that nothing was copied into: for an engine in
    the same process."""
    for _, rows in tensors:
        for row in rows:
            part, _ = _part(row, shapes, dtype)
            yield Bucket((replace(part, size=row.data.nbytes),), row.data)


def _part(row: HfRows, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[Part, int | None]:
    """Where rows belong in their tensor; and the bytes of the tensor, or the expert of a fused one, that begins with
    them, None within one."""
    shape = shapes[row.hf]
    own = shape if row.index is None else shape[1:]
    size = elements(own) * ITEMSIZE[dtype]
    first = row.row_start * elements(own[1:]) * ITEMSIZE[dtype]
    return Part(row.hf, dtype, shape, (row.index or 0) * size + first, 0, 0), None if first else size


def _in_order(mapped: Mapped, rows: Iterator[HfRows]) -> Iterable[HfRows]:
    """The rows of each tensor one after the other. Those of a row split are joined one block at a time and come so;
    the others are views of what was gathered."""
    if mapped.split == "row":
        return rows
    return sorted(rows, key=lambda row: (row.hf, row.index or 0, row.row_start))


class Room:
    """Memory for one bucket after the other: pages that no bucket reaches are never touched."""

    def __init__(self, size: int, *, count: int = 1) -> None:
        """Args: count: buckets whose data must be valid at a time."""
        self._size, self._count = max(size, ALIGN), count
        self._blocks: deque[memoryview] = deque()

    def next(self) -> memoryview:
        """For the next bucket."""
        if len(self._blocks) < self._count:
            self._blocks.append(np.empty(self._size, np.uint8).data)
        else:
            self._blocks.rotate(-1)
        return self._blocks[-1]


class _Filling:
    """The bucket being filled."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._block: memoryview | None = None
        self._parts: list[Part] = []
        self._used = 0

    @property
    def _data(self) -> memoryview:
        if self._block is None:
            self._block = self._room.next()
        return self._block

    def make_room(self, size: int) -> Iterator[Bucket]:
        """For a tensor of this size, which begins now."""
        self._used += -self._used % ALIGN
        if self._parts and self._used + size > self._data.nbytes:
            yield from self.flush()

    def add(self, part: Part, data: memoryview) -> Iterator[Bucket]:
        """`data` is what the tensor has from byte `part.start` on."""
        while data.nbytes:
            if self._used >= self._data.nbytes:
                yield from self.flush()
            piece = data[: self._data.nbytes - self._used]
            self._data[self._used : self._used + piece.nbytes] = piece
            self._note(part, piece.nbytes)
            part, data = replace(part, start=part.start + piece.nbytes), data[piece.nbytes :]

    def _note(self, part: Part, size: int) -> None:
        last = self._parts[-1] if self._parts else None
        if last is not None and (last.name, last.start + last.size, last.offset + last.size) == (
            part.name, part.start, self._used,
        ):  # fmt: skip
            self._parts[-1] = replace(last, size=last.size + size)
        else:
            self._parts.append(replace(part, offset=self._used, size=size))
        self._used += size

    def flush(self) -> Iterator[Bucket]:
        if self._parts:
            data = self._data[: self._used]
            yield Bucket(tuple(self._parts), data)
        self._block, self._parts, self._used = None, [], 0
