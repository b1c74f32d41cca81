"""Dequantises block-scaled FP8, in few numpy passes in the common case.

A pass over a tile costs as much as moving its bytes, and each pass releases and takes Python's lock. So we shift a
number's bits to float32's places, which makes it 2^120 too small, and multiply it by a scale that is 2^120 too large.
Rare cases (NaN, very large or small scales) are detected beforehand, in a whole window at once, and left to
`Computer`.

E4M3 has eight significands, so a block's products have eight too, and the scale alone tells whether one of them lies
half-way between two numbers of bfloat16. If none does, rounding to nearest needs no check for the even neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megabatch.converters.engine.compute import Computer, numpy
from megabatch.converters.engine.plan import Scales, Strip, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io.header import ITEMSIZE

_TILE = 1 << 17
"""Elements: with fewer, calls would cost more than the processor's nearest cache saves."""
_BIAS = 120
"""E4M3's exponents begin so far below float32's."""
_LARGE = 2.0 ** (127 - _BIAS)
"""From here on 2^120 times a scale is no number."""
_SMALL = 2.0**-100
"""Below it products may lack bits of float32, and of bfloat16."""


class BlockScaled:
    """One worker's arrays."""

    def __init__(self, computer: Computer, sources: Sources) -> None:
        self._np = numpy()
        self._computer, self._sources = computer, sources
        self._bits, self._rounded = (self._np.empty(_TILE, self._np.uint32) for _ in range(2))

    def dequantise(self, raw: memoryview, tensor: Tensor, strip: Strip, skip: int, *, out: memoryview) -> None:
        """Fills `out` with FP8 values times their block's scale, in float32, rounded once to the tensor's dtype.

        `raw` holds whole rows of the strip from its row `skip` on.
        """
        np, scales, columns = self._np, strip.scales, tensor.source_row_bytes
        assert scales is not None
        (height, width), first, count = scales.block, scales.first + skip, raw.nbytes // columns
        grid = self._scales(scales, first // height, (first + count - 1) // height + 1)
        codes = np.frombuffer(raw, np.int8)
        usual = tensor.dtype in ("BF16", "F32") and columns <= _TILE and not self._has_nan(codes)
        made: Any = np.frombuffer(out, "<u2" if tensor.dtype == "BF16" else "<u4") if usual else None
        row = 0
        for blocks, fits, ties in zip(grid, *self._judged(grid), strict=True):
            last = min(count, row + height - (first + row) % height)
            factors = np.repeat(blocks, width)[:columns]
            large = factors * np.float32(2.0**_BIAS) if usual and fits else None
            for start, stop in _tiles(row, last, columns):
                part = slice(start * columns, stop * columns)
                if large is not None:
                    self._multiply(codes[part], large, made[part], ties=ties)
                else:
                    target = out[start * tensor.row_bytes : stop * tensor.row_bytes]
                    self._computer.multiply(raw[part], tensor.source_dtype, factors, tensor.dtype, out=target)
            row = last

    def _scales(self, scales: Scales, first: int, last: int) -> Any:
        """Rows of blocks, float32."""
        size = scales.columns * ITEMSIZE[scales.dtype]
        raw, made = memoryview(bytearray((last - first) * size)), bytearray((last - first) * scales.columns * 4)
        self._sources.read_into(scales.source, raw, scales.offset + first * size)
        self._computer.cast(raw, scales.dtype, "F32", out=memoryview(made))
        return self._np.frombuffer(made, "<f4").reshape(last - first, scales.columns)

    def _judged(self, grid: Any) -> tuple[list[bool], list[bool]]:
        """Of each row of blocks: whether its scales are usual, and whether a product may lie half-way between two
        numbers of bfloat16."""
        np = self._np
        sizes = abs(grid)
        with np.errstate(all="ignore"):
            products = np.multiply.outer(grid, np.arange(8, 16, dtype=np.float32))
        halves = (products.view(np.uint32) & 0xFFFF == 0x8000).any(axis=(1, 2))
        return (sizes.max(axis=1) < _LARGE).tolist(), ((sizes.min(axis=1) < _SMALL) | halves).tolist()

    def _has_nan(self, codes: Any) -> bool:
        return bool(len(codes)) and bool(codes.max() == 0x7F or codes.view(self._np.uint8).max() == 0xFF)

    def _multiply(self, codes: Any, factors: Any, out: Any, *, ties: bool) -> None:
        """Rows of E4M3 times 2^-120 of their columns' factors, where nothing is rare; to BF16 or F32 by `out`."""
        np = self._np
        bits = self._bits[: len(codes)] if out.itemsize == 2 else out
        np.left_shift(codes, 20, out=bits.view(np.int32), dtype=np.int32, casting="unsafe")
        np.bitwise_and(bits, 0x87F00000, out=bits)
        values = bits.view(np.float32).reshape(-1, len(factors))
        np.multiply(values, factors, out=values)
        if out.itemsize == 4:
            return
        if ties:
            # half a unit of the upper half is added, less one bit where that is even
            rounded = self._rounded[: len(codes)]
            np.right_shift(bits, 16, out=rounded)
            np.bitwise_and(rounded, 1, out=rounded)
            np.add(rounded, 0x7FFF, out=rounded)
            np.add(rounded, bits, out=bits)
        else:
            np.add(bits, 0x8000, out=bits)
        np.right_shift(bits, 16, out=out, casting="unsafe")


def _tiles(row: int, last: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows in parts of a tile at most, all alike: one of a few rows would cost as much in calls."""
    parts = -(-(last - row) // max(1, _TILE // columns))
    step = -(-(last - row) // parts)
    for start in range(row, last, step):
        yield start, min(start + step, last)
