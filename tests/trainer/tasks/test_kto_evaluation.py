"""What KTO's evaluation says of answers to one prompt, and of losses that went flat."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.evaluation.preferences import prompts_of
from megabatch.trainer.pack import collate
from megabatch.trainer.tasks.kto import is_flat


def test_prompts_are_told_by_what_precedes_the_answer() -> None:
    texts = [([1, 2], [7, 8]), ([1], [2, 7]), ([1, 2], [9]), ([2, 1], [7, 8]), ([1], [5])]
    samples = [
        Sample(np.array(prompt + answer, np.int32), np.array([0.0] * len(prompt) + [0.5] * len(answer), np.float32))
        for prompt, answer in texts
    ]
    found = prompts_of(collate(samples, sequence_multiple=4, row_multiple=8)).tolist()
    assert found[0] == found[2] and found[1] == found[4]
    assert len(set(found)) == 3
    assert all(float(number) == number < 2**53 for number in found)
    assert prompts_of(collate([], row_multiple=8)).tolist() == []


@pytest.mark.parametrize(
    ("good", "bad", "flat"),
    [(-74, -72, True), (13, 12, True), (0.5, -0.4, False), (12, -12, False), (-9, -30, False), (math.nan, 3, False)],
)
def test_rewards_far_on_one_side_of_the_kl_are_flat(good: float, bad: float, flat: bool) -> None:
    assert is_flat(good, bad, 0.5) == flat
