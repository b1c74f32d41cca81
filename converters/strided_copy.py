"""Tensors whose rows are not contiguous in the Hugging Face file: transposed, or every second row of another.

Both directions take and give a whole tensor (for experts: of one expert). Bytes are moved, never computed with, by
strided copies of the standard library's memoryview.
"""

from __future__ import annotations

from typing import Literal

from megabatch.converters.mapping import Mapped, elements
from megabatch.values import dataclass

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""memoryview's name of an unsigned number of so many bytes."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """One direction for one tensor, as a plan holds it."""

    mapped: Mapped
    towards_hf: bool

    def __call__(self, raw: memoryview, *, itemsize: int) -> memoryview:
        if self.towards_hf:
            return to_hf(self.mapped, raw, itemsize=itemsize)
        return memoryview(to_mcore(self.mapped, raw, itemsize=itemsize))


def to_mcore(mapped: Mapped, hf: Buffer, *, itemsize: int) -> bytearray:
    """A strided tensor in megatron-core's order from all bytes of its Hugging Face tensor (of its leading index)."""
    data = bytearray(memoryview(hf).nbytes)
    _move(mapped, _numbers(data, itemsize), _numbers(hf, itemsize), towards_hf=False)
    return data


def to_hf(mapped: Mapped, mcore: Buffer, *, itemsize: int) -> memoryview:
    """The inverse of `to_mcore`."""
    data = bytearray(memoryview(mcore).nbytes)
    _move(mapped, _numbers(mcore, itemsize), _numbers(data, itemsize), towards_hf=True)
    return memoryview(data)


def _numbers(data: Buffer, itemsize: int) -> memoryview:
    return memoryview(data).cast("B").cast(_FORMATS[itemsize])


def _move(mapped: Mapped, mcore: memoryview, hf: memoryview, *, towards_hf: bool) -> None:
    rows, width = mapped.shape[0], elements(mapped.shape[1:])
    position = 0
    for piece in mapped.pieces:
        last = position + piece.count
        start, stop = piece.rows
        for column in range(width):
            ours = slice(position * width + column, last * width, width)
            if piece.transposed:  # Hugging Face's tensor has `width` rows of `rows` numbers
                theirs = slice(column * rows + start, column * rows + stop, piece.step)
            else:
                theirs = slice(start * width + column, stop * width, piece.step * width)
            if towards_hf:
                hf[theirs] = mcore[ours]
            else:
                mcore[ours] = hf[theirs]
        position = last
