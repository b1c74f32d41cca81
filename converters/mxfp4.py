"""GPT-OSS's published experts in MXFP4: four bits a number, and a power of two for each 32 of a row.

`X_blocks` [experts, rows, columns / 32, 16] has two numbers in a byte, the lower four bits first, and `X_scales`
[experts, rows, columns / 32] the powers, 127 for one (OCP Microscaling Formats 1.0, sections 5.3 and 6). Each product
is a number of bfloat16. `rows` are a linear layer's; transformers' own tensor X, and that of folders in BF16, is the
transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from megabatch.converters.bijection import TensorInfo
from megabatch.converters.engine.compute import numpy
from megabatch.converters.mapping import Mapped
from megabatch.errors import ConversionError
from megabatch.values import dataclass

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK, _BYTES = 32, 16
"""Numbers that share a power, and their bytes."""
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """A folder whose experts are in MXFP4."""

    def plain(self, found: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The folder's tensors after dequantising every block.

        Raises: ConversionError naming blocks without scales, scales without blocks, and what has a wrong shape.
        """
        result: dict[str, TensorInfo] = {}
        for name, info in found.items():
            if name.endswith(BLOCKS):
                result[name.removesuffix(BLOCKS)] = _plain(name, info, found)
            elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in found):
                result[name] = info
        return result


def _plain(name: str, info: TensorInfo, found: Mapping[str, TensorInfo]) -> TensorInfo:
    scales = name.removesuffix(BLOCKS) + SCALES
    if scales not in found:
        raise ConversionError(f"{name} {list(info.shape)}: {scales} is missing")
    if info.dtype != "U8" or len(info.shape) != 4 or info.shape[3] != _BYTES:
        raise ConversionError(f"{name} {list(info.shape)} {info.dtype}: U8 in blocks of {_BYTES} bytes is needed")
    if found[scales] != ("U8", info.shape[:3]):
        raise ConversionError(
            f"{scales} {list(found[scales].shape)} {found[scales].dtype}: {list(info.shape[:3])} U8 is needed"
        )
    experts, rows, blocks, _ = info.shape
    return TensorInfo("BF16", (experts, blocks * _BLOCK, rows))


def packed_bytes(columns: int) -> tuple[int, int]:
    """Bytes of a row's numbers and of its powers."""
    return columns // 2, columns // _BLOCK


@dataclass(frozen=True, slots=True)
class MadePlain:
    """One expert's matrix: from rows of packed numbers with their powers behind to bfloat16."""

    mapped: Mapped
    """megatron-core's tensor, whose pieces say which rows stand where in it."""
    towards_hf: bool
    """Into the order of transformers' tensor, not megatron-core's."""

    def __call__(self, raw: memoryview, *, itemsize: int) -> memoryview:
        np = numpy()
        rows, columns = self.mapped.shape
        packed = np.frombuffer(raw, np.uint8).reshape(rows, -1)
        numbers, powers = packed[:, : columns // 2], packed[:, columns // 2 :]
        codes = np.repeat(powers.astype(np.uint16) << 8, _BYTES, axis=1)
        codes |= numbers
        values = _pairs()[codes].view(np.uint16)
        if self.towards_hf:
            ordered = np.ascontiguousarray(values.T)
        else:
            ordered = np.concatenate([values[slice(*piece.rows, piece.step)] for piece in self.mapped.pieces])
        return memoryview(ordered.reshape(-1)).cast("B")


@functools.cache
def _pairs() -> Any:
    """Two numbers of bfloat16 for each power and byte, the lower half of the byte first."""
    np = numpy()
    signed = np.array([*_NUMBERS, *(-number for number in _NUMBERS)])
    with np.errstate(over="ignore"):
        # exactly what bfloat16 holds: the lower half of each float32 is zero
        products = np.ldexp(signed, np.arange(256)[:, None] - 127).astype(np.float32)
    bits = (products.view(np.uint32) >> 16).astype(np.uint32)
    bytes_ = np.arange(256)
    return (bits[:, bytes_ & 15] | bits[:, bytes_ >> 4] << 16).reshape(-1)
