"""Combines low-rank pairs of different rows into one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megabatch.converters.adapters.adapter import Block
from megabatch.converters.adapters.expert_order import Picked
from megabatch.converters.engine.gather import matrix_bytes, sliced
from megabatch.converters.engine.plan import Matrix, Strip, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError


class Rows(NamedTuple):
    """Rows of a block's left matrix and the row of the result that the first of them becomes."""

    block: Block
    row: int
    rows: int
    first: int


class Pair(NamedTuple):
    """The A and B to write, without a place in a file yet."""

    rank: int
    a: Tensor
    """[rank, columns]"""
    b: Tensor
    """[rows, rank]"""


def joined(rows: Sequence[Rows], height: int, *, sources: Sources, what: str) -> Pair:
    """One pair that adds to each row what its block adds, up to the scale; rows without a block get zero.

    Blocks with equal A share it. For others we stack their A and fill the rest of B with zeros: exact, with the sum of
    their ranks as rank.
    Raises: ConversionError for blocks that cannot be joined, naming `what`.
    """
    blocks = list(dict.fromkeys(row.block for row in rows))
    dtypes = {matrix.dtype for block in blocks for matrix in (block.left, block.right)}
    if len(dtypes) > 1:
        raise ConversionError(f"{what}: its adapters are {' and '.join(sorted(dtypes))}, but they must have one dtype")
    if _share(blocks, sources):
        first = blocks[0]
        return Pair(
            first.rank, tensor_of(first.right), _left(rows, height, first.rank, dict.fromkeys(blocks, 0), what)
        )
    starts: dict[Block, int] = {}
    strips: list[Strip] = []
    rank = 0
    for block in blocks:
        starts[block] = rank
        strips += sliced(_plain(block.right, what).strips, 0, block.rank, row=rank)
        rank += block.rank
    right = blocks[0].right._replace(rows=rank, strips=tuple(strips))
    return Pair(rank, tensor_of(right), _left(rows, height, rank, starts, what))


def _share(blocks: Sequence[Block], sources: Sources) -> bool:
    """Whether all have the same A."""
    first, *others = (block.right for block in blocks)
    others = [other for other in others if other != first]
    if any(other.shape != first.shape for other in others):
        return False
    return not others or all(matrix_bytes(sources, other) == matrix_bytes(sources, first) for other in others)


def _plain(matrix: Matrix, what: str) -> Matrix:
    if matrix.pick is not None or matrix.transposed:
        raise ConversionError(f"{what}: its adapters cannot be combined; this is a bug in megabatch")
    return matrix


def _left(rows: Sequence[Rows], height: int, rank: int, starts: dict[Block, int], what: str) -> Tensor:
    blocks = list(starts)
    if len(blocks) == 1 and (blocks[0].left.pick is not None or blocks[0].left.transposed):
        left = blocks[0].left
        strips = [cut for row in rows for cut in sliced(left.strips, row.first, row.rows, row=row.row)]
        return tensor_of(left._replace(rows=height, strips=tuple(_sorted(strips))))
    size = ITEMSIZE[blocks[0].left.dtype]
    strips = [cut for row in rows for cut in _cut(row, starts[row.block] * size, size, what)]
    return tensor_of(Matrix(height, rank, blocks[0].left.dtype, tuple(_sorted(strips))))


def _cut(row: Rows, at: int, size: int, what: str) -> Iterable[Strip]:
    """Strips of some rows of a left matrix, `at` bytes from the left of the result."""
    left = row.block.left
    strips = sliced(left.strips, row.first, row.rows, row=row.row)
    if left.pick is None:
        return [strip._replace(left=strip.left + at) for strip in strips]
    first, last, step = left.pick
    if step != 1 or any(strip.left or strip.width != left.columns * size for strip in strips):
        raise ConversionError(f"{what}: its adapters are sharded in a way that cannot be combined")
    width = (last - first) * size
    return [
        Strip(strip.row + i, 1, strip.source, strip.offset + i * strip.width + first * size, at, width)
        for strip in strips
        for i in range(strip.rows)
    ]


def _sorted(strips: Iterable[Strip]) -> list[Strip]:
    """In the order of their rows; neighbours in file and rows are one."""
    found: list[Strip] = []
    for strip in sorted(strips, key=lambda strip: (strip.row, strip.left)):
        last = found[-1] if found else None
        if last is not None and (last.source, last.left, last.width) == (strip.source, strip.left, strip.width):
            after = (last.row + last.rows, last.offset + last.rows * last.width)
            if after == (strip.row, strip.offset):
                found[-1] = last._replace(rows=last.rows + strip.rows)
                continue
        found.append(strip)
    return found


def tensor_of(matrix: Matrix) -> Tensor:
    """A matrix as it is meant, or, where it is a transpose, as it lies: a tensor that lies nowhere yet."""
    size = ITEMSIZE[matrix.dtype]
    rows, columns = matrix._replace(transposed=False).shape
    arrangement = None if matrix.pick is None else Picked(matrix.columns, matrix.pick)
    return Tensor(
        name="",
        file=0,
        offset=0,
        shape=(rows, columns),
        dtype=matrix.dtype,
        source_dtype=matrix.dtype,
        rows=rows,
        row_bytes=columns * size,
        source_row_bytes=matrix.columns * size,
        strips=matrix.strips,
        arrangement=arrangement,
    )
