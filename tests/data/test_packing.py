from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.data.packing import pack
from megabatch.errors import DataError


def one_by_one(lengths: list[int], capacity: int) -> int:
    """Packs that the plain algorithm needs: longest first, each into the fullest pack that takes it."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [index for index, left in enumerate(room) if left >= length]
        if fits:
            room[min(fits, key=lambda index: room[index])] -= length
        else:
            room.append(capacity - length)
    return len(room)


@given(lengths=st.lists(st.integers(1, 40), max_size=120), capacity=st.integers(40, 90), seed=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_every_sequence_once_within_capacity_and_as_good_as_one_by_one(
    lengths: list[int], capacity: int, seed: int
) -> None:
    sizes = np.array(lengths, np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    packs = pack(sizes, order=order, capacity=capacity)
    assert sorted(packs.members.tolist()) == list(range(len(sizes)))
    assert all(0 < sizes[packs[index]].sum() <= capacity for index in range(len(packs)))
    assert len(packs) == one_by_one(lengths, capacity)


def test_packs_and_members_follow_the_order() -> None:
    packs = pack(np.array([6, 5, 4, 3]), order=np.array([3, 0, 2, 1]), capacity=10)
    assert [packs[index].tolist() for index in range(len(packs))] == [[3, 1], [0, 2]]


def test_windows_are_packed_on_their_own() -> None:
    packs = pack(np.array([6, 6, 4, 4]), order=np.arange(4), capacity=10, window=2)
    assert [packs[index].tolist() for index in range(len(packs))] == [[0], [1], [2, 3]]


def test_word_problems_fill_packs_by_99_percent() -> None:
    lengths = np.random.default_rng(0).gamma(7, 31, 7473).astype(np.int64).clip(40, 700)
    packs = pack(lengths, order=np.arange(len(lengths)), capacity=2048)
    assert lengths.sum() / (len(packs) * 2048) >= 0.99


def test_a_sequence_beyond_the_pack_is_named() -> None:
    with pytest.raises(DataError, match=r"packing_length=10 is below the longest sample .*of 11 tokens"):
        pack(np.array([3, 11]), order=np.arange(2), capacity=10)
