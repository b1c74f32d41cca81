"""Whole items (samples, or samples that belong together) into packs of a fixed length: best fit, decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from megabatch.errors import DataError
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Packs:
    """Which items make up each pack: pack p holds `members[starts[p]:starts[p + 1]]`."""

    members: np.ndarray
    """int64 [items]"""
    starts: np.ndarray
    """int64 [packs + 1]"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.members[self.starts[pack] : self.starts[pack + 1]]


def singletons(order: np.ndarray) -> Packs:
    """Every item alone, in this order."""
    return Packs(order, np.arange(len(order) + 1))


def samples_of(items: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The samples of these items, in order, int64.

    Args: `bounds` int64 [all items + 1]: item i holds the samples from `bounds[i]` up to `bounds[i + 1]`.
    """
    firsts, counts = bounds[items], bounds[items + 1] - bounds[items]
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(counts.sum())


def pack(lengths: np.ndarray, *, order: np.ndarray, capacity: int, window: int = 1 << 20) -> Packs:
    """Packs items into packs of at most `capacity` tokens by best-fit decreasing.

    Packs each window of `window` items of `order` on its own: longest item first, each into the fullest pack with room
    for it. Items stay whole. The result depends only on the arguments.

    Args: `lengths` int [n] in tokens; `order` int [n]: a permutation, which also orders the packs (by their first
    member) and the members within a pack.
    Raises: DataError for an item longer than `capacity`.
    """
    if len(lengths) and lengths.max() > capacity:
        raise DataError(
            f"data.packing_length={capacity} is below the longest sample (or samples that stay together), of "
            f"{lengths.max()} tokens; raise it, or lower data.max_length"
        )
    bins: np.ndarray = np.empty(len(order), np.int64)
    used = 0
    for first in range(0, len(order), window):
        part = slice(first, first + window)
        found, count = _best_fit(lengths[order[part]], capacity)
        bins[part] = found + used
        used += count
    return _gather(bins, order, used)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Bin of each item, int64 [n], and the number of bins.

    Handles items of equal length, and bins with equal room, as groups, so the cost grows with the number of distinct
    lengths rather than the number of items.
    """
    items = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    bin_of: np.ndarray = np.empty(len(lengths), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # tokens left in a bin → the bins, as a list of arrays
    sizes: list[int] = []  # the keys of `room`, sorted
    at = bins = 0

    def put(left: int, some: np.ndarray) -> None:
        if left and len(some):
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left].append(some)

    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        stop = at + count
        while at < stop:
            slot = bisect_left(sizes, length)
            if slot < len(sizes):
                left = sizes[slot]
                group = room[left].pop()
                if not room[left]:
                    del room[left], sizes[slot]
            else:
                left, each = capacity, capacity // length
                group = np.arange(bins, bins + -(-(stop - at) // each))
                bins += len(group)
            each = min(left // length, stop - at)
            full = min(len(group), (stop - at) // each)
            taken = group[:full]
            bin_of[items[at : at + full * each]] = np.repeat(taken, each)
            at += full * each
            put(left - each * length, taken)
            rest = group[full:]
            if len(rest) and (few := stop - at):  # the last items fill one more bin in part
                bin_of[items[at:stop]] = rest[0]
                at = stop
                put(left - few * length, rest[:1])
                rest = rest[1:]
            put(left, rest)
    return bin_of, bins


def _gather(bins: np.ndarray, order: np.ndarray, count: int) -> Packs:
    """Packs ordered by their first member's place in `order`."""
    by_bin = np.argsort(bins, kind="stable")  # members of a bin stay in `order`
    sizes = np.bincount(bins, minlength=count)
    starts = np.cumsum(sizes) - sizes
    sequence = np.argsort(by_bin[starts], kind="stable") if count else np.arange(0)
    sizes, starts = sizes[sequence], starts[sequence]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    within = np.arange(len(bins)) - np.repeat(offsets[:-1], sizes)
    return Packs(order[by_bin[np.repeat(starts, sizes) + within]].astype(np.int64), offsets)
