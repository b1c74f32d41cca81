"""Block-scaled FP8 made plain, the common case in as few passes as numpy allows.

A pass over a tile costs as much as its bytes, and each hands Python's lock to and fro. So a number's bits are shifted
to float32's places, which makes it 2^120 too small, and multiplied by a scale that is as much too large; what only
rare numbers need (NaN, scales that large or small) is looked for beforehand and left to `Computer`.

E4M3 has eight significands, so a block's products have eight too, and whether one of them lies half-way between two
numbers of bfloat16 is known from the scale. Where none does, rounding to nearest needs no look at what is even.
"""

from __future__ import annotations

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
        scales = strip.scales
        assert scales is not None
        columns, height = tensor.source_row_bytes, scales.block[0]
        first, count = scales.first + skip, raw.nbytes // tensor.source_row_bytes
        grid = self._scales(scales, first // height, (first + count - 1) // height + 1)
        step, row = max(1, _TILE // columns), 0
        while row < count:
            number = first + row
            rows = min(step, height - number % height, count - row)
            blocks = grid[number // height - first // height]
            factors = self._np.repeat(blocks, scales.block[1])[:columns]
            part = raw[row * columns : (row + rows) * columns]
            target = out[row * tensor.row_bytes : (row + rows) * tensor.row_bytes]
            if not self._multiply(part, factors, tensor.dtype, target, ties=self._ties(blocks)):
                self._computer.multiply(part, tensor.source_dtype, factors, tensor.dtype, out=target)
            row += rows

    def _scales(self, scales: Scales, first: int, last: int) -> Any:
        """Rows of blocks, float32."""
        size = scales.columns * ITEMSIZE[scales.dtype]
        raw, made = memoryview(bytearray((last - first) * size)), bytearray((last - first) * scales.columns * 4)
        self._sources.read_into(scales.source, raw, scales.offset + first * size)
        self._computer.cast(raw, scales.dtype, "F32", out=memoryview(made))
        return self._np.frombuffer(made, "<f4").reshape(last - first, scales.columns)

    def _ties(self, scales: Any) -> bool:
        """Whether a product may lie half-way between two numbers of bfloat16."""
        np = self._np
        with np.errstate(all="ignore"):
            products = np.multiply.outer(np.arange(8, 16, dtype=np.float32), scales)
        return bool(abs(scales).min() < _SMALL or (products.view(np.uint32) & 0xFFFF == 0x8000).any())

    def _multiply(self, raw: memoryview, factors: Any, dtype: str, out: memoryview, *, ties: bool) -> bool:
        """`Computer.multiply` of E4M3 rows where nothing is rare; else False, and `out` is as it was."""
        np = self._np
        if dtype not in ("BF16", "F32") or raw.nbytes > _TILE or not abs(factors).max() < _LARGE:
            return False
        numbers = np.frombuffer(raw, np.int8)
        if numbers.max() == 0x7F or numbers.view(np.uint8).max() == 0xFF:  # NaN
            return False
        bits = self._bits[: raw.nbytes] if dtype == "BF16" else np.frombuffer(out, "<u4")
        np.left_shift(numbers, 20, out=bits.view(np.int32), dtype=np.int32, casting="unsafe")
        np.bitwise_and(bits, 0x87F00000, out=bits)
        values = bits.view(np.float32).reshape(-1, len(factors))
        np.multiply(values, factors * np.float32(2.0**_BIAS), out=values)
        if dtype == "BF16":
            if ties:
                # half a unit of the upper half is added, less one bit where that is even
                rounded = self._rounded[: raw.nbytes]
                np.right_shift(bits, 16, out=rounded)
                np.bitwise_and(rounded, 1, out=rounded)
                np.add(rounded, 0x7FFF, out=rounded)
                np.add(rounded, bits, out=bits)
            else:
                np.add(bits, 0x8000, out=bits)
            np.right_shift(bits, 16, out=np.frombuffer(out, "<u2"), casting="unsafe")
        return True
