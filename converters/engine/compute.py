"""Where bytes must change: casts between float types, and block-scaled FP8 made plain. numpy, a small tile at a time.

A tile stays in a processor's cache, so that the passes over it cost little beside reading and writing. Rounding is to
nearest, ties to even, and values pass through float32, as in torch; a NaN becomes a quiet one.
"""

from __future__ import annotations

from typing import Any

from megabatch.converters.engine.plan import Scales, Strip, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError

_TILE = 1 << 16
"""Elements."""
CASTS = ("F64", "F32", "F16", "BF16")
"""dtypes that can be cast to each other, in safetensors' names."""
FP8 = "F8_E4M3"


def numpy() -> Any:
    """numpy, which moving bytes does without. Raises: ConversionError when it is not installed."""
    try:
        import numpy
    except ImportError as error:
        raise ConversionError("casting and dequantising need numpy: pip install numpy") from error
    return numpy


def cast(raw: memoryview, source: str, target: str, *, add: float = 0.0) -> memoryview:
    """The values of `raw`, with `add` added in float32, in another dtype."""
    np = numpy()
    count = raw.nbytes // ITEMSIZE[source]
    out = np.empty(count * ITEMSIZE[target], np.uint8)
    for start in range(0, count, _TILE):
        stop = min(count, start + _TILE)
        values = _load(np, raw[start * ITEMSIZE[source] : stop * ITEMSIZE[source]], source)
        if add:
            values = values + np.float32(add)
        _store(np, values, target, out[start * ITEMSIZE[target] : stop * ITEMSIZE[target]])
    return memoryview(out).cast("B")


def dequantise(raw: memoryview, tensor: Tensor, strip: Strip, skip: int, sources: Sources) -> memoryview:
    """FP8 values times their block's scale, in float32, rounded once to the tensor's dtype.

    `raw` holds whole rows of the strip from its row `skip` on.
    """
    np, scales = numpy(), strip.scales
    assert scales is not None
    columns = tensor.source_row_bytes
    count = raw.nbytes // columns
    out = np.empty(count * tensor.row_bytes, np.uint8)
    step = max(1, _TILE // columns)
    row = 0
    while row < count:
        number = scales.first + skip + row
        inside = scales.block[0] - number % scales.block[0]
        rows = min(step, inside, count - row)
        factors = _factors(np, scales, number // scales.block[0], columns, sources)
        values = _load(np, raw[row * columns : (row + rows) * columns], tensor.source_dtype)
        values = values.reshape(rows, columns) * factors
        _store(np, values.reshape(-1), tensor.dtype, out[row * tensor.row_bytes : (row + rows) * tensor.row_bytes])
        row += rows
    return memoryview(out).cast("B")


def _factors(np: Any, scales: Scales, row: int, columns: int, sources: Sources) -> Any:
    """The scale of each column in one row of blocks."""
    size = scales.columns * ITEMSIZE[scales.dtype]
    raw = memoryview(bytearray(size))
    sources.read_into(scales.source, raw, scales.offset + row * size)
    return np.repeat(_load(np, raw, scales.dtype), scales.block[1])[:columns]


def _load(np: Any, raw: memoryview, dtype: str) -> Any:
    """float32 values."""
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return np.frombuffer(raw, "<f8").astype(np.float32)
    if dtype == "BF16":
        return np.left_shift(np.frombuffer(raw, "<u2"), 16, dtype=np.uint32, casting="unsafe").view(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == FP8:
        return _load_fp8(np, np.frombuffer(raw, np.uint8))
    raise ConversionError(f"dtype {dtype} cannot be computed with; known are {', '.join((*CASTS, FP8))}")


def _load_fp8(np: Any, raw: Any) -> Any:
    """E4M3 without infinities: the bits moved to float32's places are the value / 2^120, subnormals too."""
    bits = np.left_shift(raw, 20, dtype=np.uint32, casting="unsafe")
    magnitude = bits & np.uint32(0x07F00000)
    nan = magnitude == np.uint32(0x07F00000)
    bits &= np.uint32(0x08000000)
    bits <<= np.uint32(4)
    bits |= magnitude
    values = bits.view(np.float32)
    values *= np.float32(2.0**120)
    if nan.any():
        values[nan] = np.nan
    return values


def _store(np: Any, values: Any, dtype: str, out: Any) -> None:
    """Rounds float32 values into bytes."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        nan = np.isnan(values)
        if nan.any():
            rounded[nan] = 0x7FC0
        out.view(np.uint16)[:] = rounded
        return
    with np.errstate(over="ignore", invalid="ignore"):
        out.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype])[:] = values
