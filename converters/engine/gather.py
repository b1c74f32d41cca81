"""Gathers rows of a tensor or a matrix from strips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megabatch.converters.engine.plan import Matrix, Strip
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.shards import interleave

_CHUNK = 1 << 20


def overlapping(strips: Sequence[Strip], first: int, last: int) -> list[Strip]:
    """The strips with rows between `first` and `last`."""
    return [strip for strip in strips if strip.row < last and strip.row + strip.rows > first]


def fill(sources: Sources, strip: Strip, first: int, last: int, raw: memoryview, *, stride: int) -> None:
    """The rows `first` to `last` of a strip, into their place in a window of rows of `stride` bytes that begins at
    `first`."""
    start, stop = max(first, strip.row), min(last, strip.row + strip.rows)
    target = raw[(start - first) * stride : (stop - first) * stride]
    offset = strip.offset + (start - strip.row) * strip.width
    if strip.width == stride:
        sources.read_into(strip.source, target, offset)
        return
    part = memoryview(bytearray((stop - start) * strip.width))
    sources.read_into(strip.source, part, offset)
    interleave(target, part, offset=strip.left, width=strip.width, stride=stride)


def sliced(strips: Sequence[Strip], first: int, count: int, *, row: int) -> list[Strip]:
    """The parts of strips in the `count` rows from `first` on, renumbered to start at `row`."""
    cut = []
    for strip in overlapping(strips, first, first + count):
        start, stop = max(first, strip.row), min(first + count, strip.row + strip.rows)
        offset = strip.offset + (start - strip.row) * strip.width
        scales = strip.scales and strip.scales._replace(first=strip.scales.first + start - strip.row)
        cut.append(strip._replace(row=row + start - first, rows=stop - start, offset=offset, scales=scales))
    return cut


def matrix_bytes(sources: Sources, matrix: Matrix) -> bytearray:
    """A matrix as stored in its files, row by row."""
    stride = matrix.columns * ITEMSIZE[matrix.dtype]
    made = bytearray(matrix.rows * stride)
    for strip in matrix.strips:
        fill(sources, strip, 0, matrix.rows, memoryview(made), stride=stride)
    return made


def chunks(sources: Sources, strips: Iterable[Strip]) -> Iterator[bytes]:
    """All bytes of the strips, a megabyte at a time."""
    for strip in strips:
        size = strip.rows * strip.width
        for at in range(0, size, _CHUNK):
            data = bytearray(min(_CHUNK, size - at))
            sources.read_into(strip.source, memoryview(data), strip.offset + at)
            yield bytes(data)
