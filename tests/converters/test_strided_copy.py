"""Strided tensors against numpy, for every size of number."""

from __future__ import annotations

import numpy as np
import pytest

from megabatch.converters import strided_copy
from megabatch.converters.mapping import Mapped, Piece, Split
from megabatch.converters.shards import cut, join, shard_reads
from megabatch.errors import ConversionError

DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def strided(rows: int, width: int, *, step: int = 1, transposed: bool = False, split: Split = "column") -> Mapped:
    sections = tuple((Piece("hf", (first, rows), 3, step, transposed),) for first in range(step))
    tail = (width,) if width else ()
    return Mapped("ours", 0, 3, (rows, *tail), split, sections)


@pytest.mark.parametrize("itemsize", DTYPES)
@pytest.mark.parametrize(("rows", "width", "step", "transposed"), [
    (10, 3, 2, True), (6, 5, 1, True), (8, 3, 2, False), (12, 0, 2, False), (9, 4, 3, True), (2, 1, 2, True),
])  # fmt: skip
def test_both_directions_equal_numpy(itemsize: int, rows: int, width: int, step: int, transposed: bool) -> None:
    tensor = strided(rows, width, step=step, transposed=transposed)
    ours = np.random.default_rng(0).integers(0, 255, (rows, *tensor.shape[1:])).astype(DTYPES[itemsize])
    stacked = ours.reshape(step, rows // step, *tensor.shape[1:])  # the pieces one below the other
    theirs = np.ascontiguousarray(np.swapaxes(stacked, 0, 1)).reshape(ours.shape)
    theirs = np.ascontiguousarray(theirs.T) if transposed else theirs
    assert bytes(strided_copy.to_mcore(tensor, theirs.tobytes(), itemsize=itemsize)) == ours.tobytes()
    assert bytes(strided_copy.to_hf(tensor, ours.tobytes(), itemsize=itemsize)) == theirs.tobytes()


@pytest.mark.parametrize("split", ["column", "row", "replicated"])
def test_shards_are_joined_as_they_were_cut(split: Split) -> None:
    tensor = strided(8, 6, step=2, transposed=True, split=split)
    whole = bytearray(range(48))
    shards = [memoryview(cut(tensor, whole, itemsize=1, tp_rank=rank, tp_size=2)) for rank in range(2)]
    assert bytes(join(tensor, shards)) == bytes(whole)
    if split == "column":  # of both sections the first half
        assert bytes(shards[0]) == bytes([*range(12), *range(24, 36)])


def test_woven_tensors_have_no_runs_to_read() -> None:
    with pytest.raises(ConversionError, match="ours is strided, so not moved by rows"):
        shard_reads(strided(8, 6, transposed=True), tp_rank=0, tp_size=1)
