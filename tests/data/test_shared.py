"""What the answers to a prompt have in common, by hand, and what packs make of it."""

from __future__ import annotations

import numpy as np
import pytest

from megabatch.data.schedule import Schedule, cost
from megabatch.data.tokens.sample import Encoded
from megabatch.data.tokens.shared import SHARED, in_common, with_shared


@pytest.mark.parametrize(
    ("ids", "first_learned", "count"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [3, 3], 2),  # the last token of the prompt predicts, and is each one's own
        ([[1, 2, 3, 4], [1, 2, 3, 4, 5]], [3, 3], 2),  # an answer that starts like the other
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [3, 1], 0),  # an earlier turn is learned in one of them
        ([[1, 2, 3, 4], [1, 7, 3, 4]], [3, 3], 0),
        ([[1, 2, 3, 4], [9, 2, 3, 4]], [3, 3], 0),
        ([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]], [9, 9, 9], 2),  # nothing is learned: a token remains
    ],
)
def test_tokens_in_common_by_hand(ids: list[list[int]], first_learned: list[int], count: int) -> None:
    weights = [
        (np.arange(len(one)) >= first).astype(np.float32) for one, first in zip(ids, first_learned, strict=True)
    ]
    item = [Encoded(np.array(one, np.int32), own) for one, own in zip(ids, weights, strict=True)]
    assert in_common([one.ids for one in item], weights) == count
    assert [sample.columns[SHARED] for sample in with_shared(item)] == [0, *[count] * (len(ids) - 1)]


def test_packs_hold_a_prompt_once() -> None:
    """Two pairs of 6 + 7 tokens, 4 of them in common."""
    lengths, items = np.array([6, 7, 6, 7]), np.array([0, 2, 4])
    how = {"items": items, "global_batch_size": 1, "packing_length": 20, "dataset_shuffle": False}
    assert len(Schedule(lengths, **how)) == 2
    shared = Schedule(lengths, shared=np.array([0, 4, 0, 4]), **how)
    assert shared.samples(0).tolist() == [0, 1, 2, 3]
    assert shared.fingerprint != Schedule(lengths, **how).fingerprint
    plain = {**how, "packing_length": None}
    assert (
        Schedule(lengths, shared=np.array([0, 4, 0, 4]), **plain).fingerprint == Schedule(lengths, **plain).fingerprint
    )


def test_the_cost_of_a_shared_prompt_is_counted_once() -> None:
    """An answer of 3 tokens behind 4 has 3 rows of queries, and 7² - 4² pairs of them with keys."""
    assert cost(np.array([7]), hidden_size=1, shared=np.array([4])) == 3 + (49 - 16) / 12
