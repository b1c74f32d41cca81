"""A conversion as data: every byte of every output file, and where it comes from.

We make a plan before writing anything, and it is the same on every machine that makes it from the same files: its
digest names it, so ranks can share it without communicating, and a later run can resume an interrupted one.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from megabatch.errors import ConversionError

FORMAT = 1
"""Increased when the same plan would produce different bytes, so that older leftovers are refused."""


class Frame(Protocol):
    """Bytes around a tensor's data that depend on its checksum; `torch_dist.archive.Archive` is one."""

    data_offset: int
    total: int

    def prefix(self, crc: int) -> bytes: ...

    def suffix(self, crc: int) -> bytes: ...


class Scales(NamedTuple):
    """Block scales of quantised rows: one for each `block` rows and columns of the whole source tensor."""

    source: int
    offset: int
    """First byte of the whole scale tensor in its file."""
    dtype: str
    columns: int
    """Scales in a row of it."""
    first: int
    """Number, in the whole source tensor, of the strip's first row."""
    block: tuple[int, int]


class Blocks(NamedTuple):
    """How a tensor of floats is made block-scaled FP8; two tensors come of it, the numbers and their scales."""

    height: int
    width: int
    """Rows and columns that share a scale."""
    powers_of_two: bool
    """Whether scales are."""
    rows: int
    """Rows that the strips give."""
    columns: int
    makes: Literal["weights", "scales"]


class Strip(NamedTuple):
    """Consecutive rows of a target tensor, or a range of columns of them, that lie densely in one source file."""

    row: int
    rows: int
    source: int
    """Number of the source file."""
    offset: int
    """First byte in it."""
    left: int
    """First byte of each row that the strip gives, counted in the source's dtype."""
    width: int
    """Bytes of each row that it gives."""
    scales: Scales | None = None


class Matrix(NamedTuple):
    """A small matrix of an adapter, held in memory during the write of a tensor."""

    rows: int
    columns: int
    """As it lies in its files."""
    dtype: str
    strips: tuple[Strip, ...]
    """Its rows; numbers that none gives are zero."""
    pick: tuple[int, int, int] | None = None
    """First column, a column after the last, and the step between the columns that count; None for all of them."""
    transposed: bool = False
    """It is the transpose, of the columns that count, that is meant."""
    name: str = ""
    """Of the tensor that it is, or is part of, in its files."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of what is meant."""
        columns = self.columns if self.pick is None else len(range(*self.pick))
        return (columns, self.rows) if self.transposed else (self.rows, columns)


class LowRank(NamedTuple):
    """`scale * left @ right`, in float32, added to consecutive rows of a tensor."""

    row: int
    rows: int
    left: Matrix
    """[its rows, rank]"""
    first: int
    every: int
    """Of the left matrix every so many-th row counts, from the `first` on."""
    right: Matrix
    """[rank, columns of the tensor]"""
    scale: float


class Arrangement(Protocol):
    """Puts the numbers of a whole tensor into another order; its `repr` says which."""

    def __call__(self, raw: memoryview, *, itemsize: int) -> memoryview: ...


class Tensor(NamedTuple):
    """One tensor of the output (of one that holds all experts, one expert), as rows of equal length."""

    name: str
    file: int
    """Number of the target file."""
    offset: int
    """First byte in it: of the frame, where there is one, else of the data."""
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of what is written."""
    source_dtype: str
    rows: int
    row_bytes: int
    """Bytes of a row as it is written."""
    source_row_bytes: int
    strips: tuple[Strip, ...]
    """In the order of their rows; they give a byte of the tensor once at most, and those that they leave are zero."""
    add: float = 0.0
    """Added to every value."""
    arrangement: Arrangement | None = None
    """For a tensor whose strips give it in another order; it is then moved whole."""
    blocks: Blocks | None = None
    """For block-scaled FP8 and its scales; the strips then give `blocks.rows` rows of floats."""
    low_rank: tuple[LowRank, ...] = ()
    """What adapters add to it, in this order, where it has its final arrangement and before it is rounded."""
    frame: Frame | None = None

    @property
    def data_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def total(self) -> int:
        """Bytes in the target file, with the frame."""
        return self.data_bytes if self.frame is None else self.frame.total

    @property
    def data_offset(self) -> int:
        return self.offset + (0 if self.frame is None else self.frame.data_offset)

    @property
    def is_moved(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.dtype == self.source_dtype and not self.add and self.blocks is None and not self.low_rank

    @property
    def has_gaps(self) -> bool:
        """Whether there are bytes that no strip gives."""
        return sum(strip.rows * strip.width for strip in self.strips) < self.rows * self.source_row_bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source file; a changed size or time shows that it changed."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file of tensors: `size` bytes that begin with `head`."""

    name: str
    size: int
    head: bytes = b""
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file written when the tensors are there; made when it is needed, since it may be large for a large model."""

    name: str
    make: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class AuxiliaryFiles:
    """Files copied from a Hugging Face folder, some with changed contents."""

    folder: Path
    replaced: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion reads and writes."""

    direction: str
    """`to_mcore` or `to_hf`."""
    source: Path
    sources: list[SourceFile]
    files: list[TargetFile]
    tensors: list[Tensor]
    small: list[SmallFile]
    """In write order: last comes the file without which no loader accepts the folder."""
    auxiliary: AuxiliaryFiles | None
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the source that we skip, each with the reason."""
    notes: Sequence[str] = ()
    """Further notes about the output."""
    lacks: Sequence[str] = ()
    """Tensors that the source leaves out because they repeat another one, as not every folder does."""

    @cached_property
    def digest(self) -> str:
        """Names the plan: hexadecimal, equal for equal plans over unchanged files."""
        made = hashlib.blake2b(digest_size=20)
        made.update(repr((FORMAT, self.direction)).encode())
        for source in self.sources:
            made.update(repr((source.path.name, source.size, source.mtime_ns)).encode())
        for file in self.files:
            made.update(repr((file.name, file.size)).encode() + file.head + file.tail)
        for tensor in self.tensors:
            made.update(repr(tensor[:-1]).encode())
        if self.auxiliary is not None:
            made.update(repr(sorted(self.auxiliary.replaced.items())).encode())
        return made.hexdigest()

    @property
    def tensor_file_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def bytes_needed(self) -> int:
        """Free disk that the output needs: all files of tensors, and an upper bound for the others."""
        return self.tensor_file_bytes + 1_000 * len(self.tensors) + _auxiliary_bytes(self.auxiliary) + (64 << 10)


def _auxiliary_bytes(auxiliary: AuxiliaryFiles | None) -> int:
    from megabatch.converters.auxiliary_files import auxiliary_files

    if auxiliary is None:
        return 0
    return sum((auxiliary.folder / name).stat().st_size for name in auxiliary_files(auxiliary.folder))


class Numbered:
    """Numbers the source files."""

    def __init__(self) -> None:
        self.files: list[SourceFile] = []
        self._numbers: dict[str, int] = {}

    def number(self, path: Path) -> int:
        name = str(path)  # comparing paths is slow
        if name not in self._numbers:
            self._numbers[name] = len(self.files)
            self.files.append(_source_file(path))
        return self._numbers[name]


def _source_file(path: Path) -> SourceFile:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
    return SourceFile(path, found.st_size, found.st_mtime_ns)


@contextmanager
def uncollected() -> Iterator[None]:
    """Turns off the garbage collector: a plan is a million small objects without cycles, and scanning them again and
    again takes 40 % of the planning time for a model of 10^12 parameters."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
