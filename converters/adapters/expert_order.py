"""The order in which PEFT stores the adapters of all experts: bytes are moved, never computed with.

In its B of all experts, [rows, rank x experts], an expert's columns lie `experts` apart, so one expert's numbers are
strided over the whole tensor.
"""

from __future__ import annotations

from typing import Literal

from megabatch.values import dataclass

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _numbers(raw: memoryview, itemsize: int) -> memoryview:
    return raw.cast("B").cast(_FORMATS[itemsize])


@dataclass(frozen=True, slots=True)
class ExpertsApart:
    """[rows, rank x experts] as experts one behind the other, [experts, rows, rank]."""

    experts: int

    def __call__(self, raw: memoryview, *, itemsize: int) -> memoryview:
        made = memoryview(bytearray(raw.nbytes))
        theirs, ours = _numbers(raw, itemsize), _numbers(made, itemsize)
        size = len(theirs) // self.experts
        for expert in range(self.experts):
            ours[expert * size : (expert + 1) * size] = theirs[expert :: self.experts]
        return made


@dataclass(frozen=True, slots=True)
class ExpertsTogether:
    """The inverse of `ExpertsApart`."""

    experts: int

    def __call__(self, raw: memoryview, *, itemsize: int) -> memoryview:
        made = memoryview(bytearray(raw.nbytes))
        ours, theirs = _numbers(raw, itemsize), _numbers(made, itemsize)
        size = len(ours) // self.experts
        for expert in range(self.experts):
            theirs[expert :: self.experts] = ours[expert * size : (expert + 1) * size]
        return made


@dataclass(frozen=True, slots=True)
class Picked:
    """Some columns of a matrix."""

    columns: int
    pick: tuple[int, int, int]
    """First, a column after the last, step."""

    def __call__(self, raw: memoryview, *, itemsize: int) -> memoryview:
        numbers, (first, last, step) = _numbers(raw, itemsize), self.pick
        rows, width = len(numbers) // self.columns, len(range(*self.pick))
        made = memoryview(bytearray(rows * width * itemsize))
        picked = _numbers(made, itemsize)
        for column, place in enumerate(range(first, last, step)):
            picked[column::width] = numbers[place :: self.columns]
        return made
