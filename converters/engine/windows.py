"""Computes a tensor's output bytes, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from megabatch.converters.engine.gather import fill, overlapping
from megabatch.converters.engine.plan import Blocks, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError

if TYPE_CHECKING:
    from megabatch.converters.engine.block_quantise import BlockQuantiser
    from megabatch.converters.engine.block_scaled import BlockScaled
    from megabatch.converters.engine.compute import Computer
    from megabatch.converters.engine.low_rank import Merger

BUFFER_BYTES = 2 << 20
"""Of one worker. Larger ones leave the processor's cache between reading, checksum and writing."""


class Windows:
    """One worker's buffers."""

    def __init__(self, sources: Sources, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._sources = sources
        self._size = buffer_bytes
        self._raw = memoryview(bytearray(buffer_bytes))
        self._made = memoryview(bytearray())

    def of(self, tensor: Tensor) -> Iterator[memoryview]:
        """The data in order; each block is valid until the next is asked for."""
        step = max(1, self._size // max(1, tensor.source_row_bytes, tensor.row_bytes))
        rows = tensor.rows
        if tensor.blocks is not None:
            rows, step = tensor.blocks.rows, max(1, step // tensor.blocks.height) * tensor.blocks.height
        if tensor.arrangement is not None:
            step = rows
        for first in range(0, rows, step):
            last = min(first + step, rows)
            raw = self._room((last - first) * tensor.source_row_bytes)
            if tensor.has_gaps:
                raw[:] = bytes(raw.nbytes)
            for strip in overlapping(tensor.strips, first, last):
                fill(self._sources, strip, first, last, raw, stride=tensor.source_row_bytes)
            if tensor.arrangement is not None:
                raw = tensor.arrangement(raw, itemsize=ITEMSIZE[tensor.source_dtype])
            if tensor.blocks is not None:
                yield self._quantised(tensor, tensor.blocks, raw)
            else:
                yield raw if tensor.is_moved else self._converted(tensor, first, last, raw)

    def _room(self, size: int) -> memoryview:
        if size > self._raw.nbytes:
            self._raw = memoryview(bytearray(size))
        return self._raw[:size]

    def _converted(self, tensor: Tensor, first: int, last: int, raw: memoryview) -> memoryview:
        if not tensor.low_rank:
            return self._plain(tensor, first, last, raw)
        dtype = tensor.source_dtype
        if any(strip.scales is not None for strip in tensor.strips):
            dtype, columns = "F32", tensor.row_bytes // ITEMSIZE[tensor.dtype]
            raw = self._plain(tensor._replace(dtype=dtype, row_bytes=4 * columns), first, last, raw)
        return self._merger.add(raw, tensor, first, source_dtype=dtype)

    def _plain(self, tensor: Tensor, first: int, last: int, raw: memoryview) -> memoryview:
        made = self._room_for_made((last - first) * tensor.row_bytes)
        strips = overlapping(tensor.strips, first, last)
        if all(strip.scales is None for strip in strips):
            self._computer.cast(raw, tensor.source_dtype, tensor.dtype, out=made, add=tensor.add)
            return made
        for strip in strips:
            start, stop = max(first, strip.row), min(last, strip.row + strip.rows)
            rows = raw[(start - first) * tensor.source_row_bytes : (stop - first) * tensor.source_row_bytes]
            out = made[(start - first) * tensor.row_bytes : (stop - first) * tensor.row_bytes]
            self._scaled.dequantise(rows, tensor, strip, start - strip.row, out=out)
        return made

    def _quantised(self, tensor: Tensor, blocks: Blocks, raw: memoryview) -> memoryview:
        count = raw.nbytes // tensor.source_row_bytes
        rows = count if blocks.makes == "weights" else -(-count // blocks.height)
        made = self._room_for_made(rows * tensor.row_bytes)
        make = self._quantiser.weights if blocks.makes == "weights" else self._quantiser.scales
        try:
            make(raw, tensor.source_dtype, blocks, out=made)
        except ConversionError as error:
            raise ConversionError(f"{tensor.name} {list(tensor.shape)} {tensor.source_dtype}: {error}") from error
        return made

    def _room_for_made(self, size: int) -> memoryview:
        if size > self._made.nbytes:
            self._made = memoryview(bytearray(size))
        return self._made[:size]

    @cached_property
    def _computer(self) -> Computer:
        from megabatch.converters.engine.compute import Computer

        return Computer()

    @cached_property
    def _merger(self) -> Merger:
        from megabatch.converters.engine.low_rank import Merger

        return Merger(self._computer, self._sources)

    @cached_property
    def _scaled(self) -> BlockScaled:
        from megabatch.converters.engine.block_scaled import BlockScaled

        return BlockScaled(self._computer, self._sources)

    @cached_property
    def _quantiser(self) -> BlockQuantiser:
        from megabatch.converters.engine.block_quantise import BlockQuantiser

        return BlockQuantiser(self._computer)
