"""A tensor's bytes as they will be written, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megabatch.converters.engine.plan import Strip, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.shards import interleave

if TYPE_CHECKING:
    from megabatch.converters.engine.block_scaled import BlockScaled
    from megabatch.converters.engine.compute import Computer

BUFFER_BYTES = 2 << 20
"""Of one worker. Larger ones leave the processor's cache between reading, checksum and writing."""


class Windows:
    """One worker's buffers."""

    def __init__(self, sources: Sources, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._sources = sources
        self._size = buffer_bytes
        self._raw = memoryview(bytearray(buffer_bytes))
        self._made = memoryview(bytearray())
        self._computer: Computer | None = None
        self._scaled: BlockScaled | None = None

    def of(self, tensor: Tensor) -> Iterator[memoryview]:
        """The data in order; each block is valid until the next is asked for."""
        step = max(1, self._size // max(1, tensor.source_row_bytes, tensor.row_bytes))
        if tensor.arrangement is not None:
            step = tensor.rows
        for first in range(0, tensor.rows, step):
            last = min(first + step, tensor.rows)
            raw = self._room((last - first) * tensor.source_row_bytes)
            for strip in _overlapping(tensor.strips, first, last):
                self._fill(tensor, strip, first, last, raw)
            if tensor.arrangement is not None:
                raw = tensor.arrangement(raw, itemsize=ITEMSIZE[tensor.source_dtype])
            yield raw if tensor.is_moved else self._converted(tensor, first, last, raw)

    def _room(self, size: int) -> memoryview:
        if size > self._raw.nbytes:
            self._raw = memoryview(bytearray(size))
        return self._raw[:size]

    def _fill(self, tensor: Tensor, strip: Strip, first: int, last: int, raw: memoryview) -> None:
        """The rows `first` to `last` of a strip, into their place in a window that begins at `first`."""
        start, stop = max(first, strip.row), min(last, strip.row + strip.rows)
        stride = tensor.source_row_bytes
        target = raw[(start - first) * stride : (stop - first) * stride]
        offset = strip.offset + (start - strip.row) * strip.width
        if strip.width == stride:
            self._sources.read_into(strip.source, target, offset)
            return
        part = memoryview(bytearray((stop - start) * strip.width))
        self._sources.read_into(strip.source, part, offset)
        interleave(target, part, offset=strip.left, width=strip.width, stride=stride)

    def _converted(self, tensor: Tensor, first: int, last: int, raw: memoryview) -> memoryview:
        if self._computer is None:
            from megabatch.converters.engine.compute import Computer

            self._computer = Computer()
        size = (last - first) * tensor.row_bytes
        if size > self._made.nbytes:
            self._made = memoryview(bytearray(size))
        made = self._made[:size]
        strips = _overlapping(tensor.strips, first, last)
        if all(strip.scales is None for strip in strips):
            self._computer.cast(raw, tensor.source_dtype, tensor.dtype, out=made, add=tensor.add)
            return made
        if self._scaled is None:
            from megabatch.converters.engine.block_scaled import BlockScaled

            self._scaled = BlockScaled(self._computer, self._sources)
        for strip in strips:
            start, stop = max(first, strip.row), min(last, strip.row + strip.rows)
            rows = raw[(start - first) * tensor.source_row_bytes : (stop - first) * tensor.source_row_bytes]
            out = made[(start - first) * tensor.row_bytes : (stop - first) * tensor.row_bytes]
            self._scaled.dequantise(rows, tensor, strip, start - strip.row, out=out)
        return made


def _overlapping(strips: tuple[Strip, ...], first: int, last: int) -> list[Strip]:
    """The strips with rows between `first` and `last`."""
    return [strip for strip in strips if strip.row < last and strip.row + strip.rows > first]
