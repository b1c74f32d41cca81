"""Casts between float types, and dequantises block-scaled FP8. numpy, a small tile at a time.

A tile stays in a processor's cache, so that the passes over it cost little beside reading and writing; its arrays are
made once, because fresh memory costs more than the arithmetic. Rounding is to nearest, ties to even, and values pass
through float32, as in torch; a NaN becomes a quiet one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megabatch.converters.dtypes import FP8
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError

_TILE = 1 << 16
"""Elements."""
CASTS = ("F64", "F32", "F16", "BF16")
"""dtypes that can be cast to each other, in safetensors' names."""


def numpy() -> Any:
    """numpy, which moving bytes does without. Raises: ConversionError when it is not installed."""
    try:
        import numpy
    except ImportError as error:
        raise ConversionError("casting and dequantising need numpy: pip install numpy") from error
    return numpy


class Computer:
    """One worker's arithmetic and the arrays of its tile."""

    def __init__(self) -> None:
        self._np = numpy()
        self._values, self._one, self._other = (self._np.empty(_TILE, self._np.uint32) for _ in range(3))

    def cast(self, raw: memoryview, source: str, target: str, *, out: memoryview, add: float = 0.0) -> None:
        """Fills `out` with the values of `raw`, with `add` added in float32, in another dtype."""
        count = raw.nbytes // ITEMSIZE[source]
        for start in range(0, count, _TILE):
            stop = min(count, start + _TILE)
            values = self._load(raw[start * ITEMSIZE[source] : stop * ITEMSIZE[source]], source)
            if add:
                values += self._np.float32(add)
            self._store(values, target, out[start * ITEMSIZE[target] : stop * ITEMSIZE[target]])

    def is_finite(self, raw: memoryview, dtype: str) -> bool:
        """Whether there is neither an infinity nor NaN among numbers."""
        size = _TILE * ITEMSIZE[dtype]
        parts = (raw[start : start + size] for start in range(0, raw.nbytes, size))
        return all(self._np.isfinite(self._load(part, dtype)).all() for part in parts)

    def multiply(self, raw: memoryview, source: str, factors: Any, target: str, *, out: memoryview) -> None:
        """Fills `out` with values times their column's factor (float32), rounded once to another dtype.

        `raw` holds rows of as many values as there are factors.
        """
        self._reserve(raw.nbytes // ITEMSIZE[source])
        values = self._load(raw, source)
        grid = values.reshape(-1, len(factors))
        with self._np.errstate(over="ignore", invalid="ignore"):
            grid *= factors
        self._store(values, target, out)

    def change(
        self, raw: memoryview, source: str, target: str, *, count: int, by: Callable[[Any, int], None], out: memoryview
    ) -> None:
        """Fills `out` with values that `by(values, number of the first)` changes in float32, `count` at a time."""
        self._reserve(count)
        whole = raw.nbytes // ITEMSIZE[source]
        for start in range(0, whole, count):
            stop = min(whole, start + count)
            values = self._load(raw[start * ITEMSIZE[source] : stop * ITEMSIZE[source]], source)
            by(values, start)
            self._store(values, target, out[start * ITEMSIZE[target] : stop * ITEMSIZE[target]])

    def _reserve(self, count: int) -> None:
        """Makes room for more than a tile."""
        if count > len(self._values):
            self._values, self._one, self._other = (self._np.empty(count, self._np.uint32) for _ in range(3))

    def _load(self, raw: memoryview, dtype: str) -> Any:
        """float32 values, in an array that the next call fills again."""
        np = self._np
        bits = self._values[: raw.nbytes // ITEMSIZE[dtype]]
        values = bits.view(np.float32)
        if dtype in ("F32", "F64"):
            with np.errstate(over="ignore"):
                values[:] = np.frombuffer(raw, {"F32": "<f4", "F64": "<f8"}[dtype])
        elif dtype == "BF16":
            np.left_shift(np.frombuffer(raw, "<u2"), 16, out=bits, dtype=np.uint32, casting="unsafe")
        elif dtype == "F16":
            self._widen(np.frombuffer(raw, "<i2"), bits, shift=13, exponents=0x7C00, bias=112)
        elif dtype == FP8:
            # E4M3 has no infinities, and NaN alone above its numbers
            self._widen(np.frombuffer(raw, np.int8), bits, shift=20, exponents=0x7F, bias=120)
        else:
            raise ConversionError(
                f"dtype {dtype} is not supported in computations; known are {', '.join((*CASTS, FP8))}"
            )
        return values

    def _widen(self, raw: Any, bits: Any, *, shift: int, exponents: int, bias: int) -> None:
        """Small floats: their bits moved to float32's places are the value / 2^bias, subnormals too.

        `raw` are signed numbers, so that the sign comes along. Magnitudes from `exponents` on, as in `raw`, are
        infinities and NaN.
        """
        np = self._np
        largest = (1 << 8 * raw.itemsize - 1) - 1
        np.left_shift(raw, shift, out=bits.view(np.int32), dtype=np.int32, casting="unsafe")
        np.bitwise_and(bits, 0x80000000 | largest << shift, out=bits)
        np.multiply(bits.view(np.float32), np.float32(2.0**bias), out=bits.view(np.float32))
        magnitude = raw & largest
        if len(magnitude) and magnitude.max() >= exponents:
            # float32's largest exponent above the same fraction; E4M3's NaN has no fraction left to keep
            bits[magnitude >= exponents] |= 0x7F800000 if raw.itemsize > 1 else 0x7FC00000

    def _store(self, values: Any, dtype: str, out: memoryview) -> None:
        """Rounds float32 values into bytes."""
        np = self._np
        if dtype == "BF16":
            self._round_bfloat(values, np.frombuffer(out, "<u2"))
        elif dtype == "F16":
            np.frombuffer(out, "<u2")[:] = self._rounded_half(values)
        else:
            np.frombuffer(out, {"F32": "<f4", "F64": "<f8"}[dtype])[:] = values

    def _round_bfloat(self, values: Any, out: Any) -> None:
        """The upper half of each number's bits: half a unit is added, less one bit where the kept part is even."""
        np, bits = self._np, values.view(self._np.uint32)
        rounded = self._one[: len(bits)]
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=out, casting="unsafe")
        if len(values) and np.isnan(values.max()):
            out[np.isnan(values)] = 0x7FC0

    def _rounded_half(self, values: Any) -> Any:
        """As above, with the exponent moved; below 2^-14 adding 0.5 makes the processor round at the right bit.

        numpy's own conversion is ten times as slow, and a hundred times for what does not fit.
        """
        np, bits = self._np, values.view(self._np.uint32)
        rounded, magnitude = self._one[: len(bits)], self._other[: len(bits)]
        np.bitwise_and(bits, 0x7FFFFFFF, out=magnitude)
        np.right_shift(magnitude, 13, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0xFFF - (112 << 23) & 0xFFFFFFFF, out=rounded)
        np.add(rounded, magnitude, out=rounded)
        np.right_shift(rounded, 13, out=rounded)
        if not len(magnitude):
            return rounded
        if magnitude.min() < 0x38800000:
            with np.errstate(invalid="ignore"):  # a NaN elsewhere in the tile
                shifted = (magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
            np.copyto(rounded, shifted, where=magnitude < 0x38800000)
        if magnitude.max() >= 0x47800000:
            large = magnitude >= 0x47800000
            rounded[large] = np.where(magnitude[large] > 0x7F800000, 0x7E00, 0x7C00)
        np.right_shift(bits, 16, out=magnitude)
        np.bitwise_and(magnitude, 0x8000, out=magnitude)
        np.bitwise_or(rounded, magnitude, out=rounded)
        return rounded
