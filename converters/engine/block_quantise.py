"""Floats to block-scaled FP8: a block's scale is its largest magnitude / 448, and a number is rounded once behind it.

`scale = max(float32(magnitude / 448), 2^-126)`, 1 for a block of zeros, and where scales must be powers of two the
next one up; `fp8 = round(float32(number / scale))` to nearest, ties to even: as DeepSeek's published weights were made
(arXiv 2412.19437, section 3.3, blocks of 128 x 128).
"""

from __future__ import annotations

from typing import Any

from megabatch.converters.engine.compute import Computer, numpy
from megabatch.converters.engine.plan import Blocks
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError

_LARGEST = 448.0
"""E4M3's largest number."""
_SMALLEST_SCALE = 2.0**-126
_TILE = 1 << 17
"""Elements."""


class BlockQuantiser:
    """One worker's arrays."""

    def __init__(self, computer: Computer) -> None:
        self._np = numpy()
        self._computer = computer
        self._values, self._units = (self._np.empty(0, self._np.float32) for _ in range(2))

    def weights(self, raw: memoryview, dtype: str, blocks: Blocks, *, out: memoryview) -> None:
        """Fills `out` with E4M3 numbers of whole rows, which begin with a row of blocks.

        Raises: ConversionError for values that are no finite numbers.
        """
        columns, step = blocks.columns, blocks.height * blocks.columns
        for start in range(0, out.nbytes, step):
            count = min(step, out.nbytes - start)
            values = self._load(raw, dtype, start, count)
            grid = values.reshape(-1, columns)
            scales = self._np.repeat(self._scales(grid, blocks), blocks.width)[:columns]
            rows = max(1, _TILE // columns)
            for row in range(0, len(grid), rows):
                part = grid[row : row + rows]
                part /= scales
                first = start + row * columns
                self._round(part.reshape(-1), self._np.frombuffer(out[first : first + part.size], "u1"))

    def scales(self, raw: memoryview, dtype: str, blocks: Blocks, *, out: memoryview) -> None:
        """Fills `out` with the float32 scales of the same rows, one row for each row of blocks."""
        made = self._np.frombuffer(out, "<f4").reshape(-1, -(-blocks.columns // blocks.width))
        step, whole = blocks.height * blocks.columns, raw.nbytes // ITEMSIZE[dtype]
        for number, start in enumerate(range(0, whole, step)):
            values = self._load(raw, dtype, start, min(step, whole - start))
            made[number] = self._scales(values.reshape(-1, blocks.columns), blocks)

    def _load(self, raw: memoryview, dtype: str, start: int, count: int) -> Any:
        """float32 values from the element `start` on."""
        if count > len(self._values):
            self._values, self._units = (self._np.empty(count, self._np.float32) for _ in range(2))
        values, part = self._values[:count], raw[start * ITEMSIZE[dtype] : (start + count) * ITEMSIZE[dtype]]
        if dtype == "BF16":  # `cast` would need a pass more
            bits = values.view(self._np.uint32)
            self._np.left_shift(self._np.frombuffer(part, "<u2"), 16, out=bits, dtype=bits.dtype, casting="unsafe")
        else:
            self._computer.cast(part, dtype, "F32", out=memoryview(values).cast("B"))
        return values

    def _scales(self, grid: Any, blocks: Blocks) -> Any:
        """The scales of one row of blocks."""
        np = self._np
        magnitudes = self._units[: grid.size].reshape(grid.shape)
        np.abs(grid, out=magnitudes)
        largest = np.maximum.reduceat(magnitudes.max(axis=0), range(0, grid.shape[1], blocks.width))
        if not np.isfinite(largest).all():
            raise ConversionError("has infinities or NaN, which block-scaled FP8 cannot scale")
        scales = np.maximum(largest / np.float32(_LARGEST), np.float32(_SMALLEST_SCALE))
        if blocks.powers_of_two:
            fraction, exponent = np.frexp(scales)
            scales = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
        scales[largest == 0] = 1
        return scales

    def _round(self, values: Any, out: Any) -> None:
        """E4M3 of numbers up to 448: adding 1.5 x 2^20 times a number's power of two makes the processor round behind
        three bits of its fraction, below 2^-6 behind the last bit of the subnormals."""
        np = self._np
        np.signbit(values, out=out.view(bool))  # also of what is rounded to zero
        np.multiply(out, 0x80, out=out)
        units = self._units[: len(values)]
        bits = units.view(np.uint32)
        np.bitwise_and(values.view(np.uint32), 0x7F800000, out=bits)
        np.maximum(bits, (127 - 6) << 23, out=bits)
        np.add(bits, (20 << 23) + (1 << 22), out=bits)
        np.add(values, units, out=values)
        np.subtract(values, units, out=values)
        np.multiply(values, np.float32(2.0**-120), out=values)
        low = units.view(np.uint8)[: len(out)]
        np.right_shift(values.view(np.uint32), 20, out=low, casting="unsafe")
        np.bitwise_or(out, low, out=out)
