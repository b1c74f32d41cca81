"""Importance corrections and masks, by numbers worked out by hand: two completions of three and one tokens."""

from __future__ import annotations

import math

import pytest
import torch

from megabatch.rl.corrections import (
    difference,
    effective_sample_size,
    is_corrected,
    is_too_far,
    log_ratios,
    rollout_weights,
)
from megabatch.rl.sequences import Sequences

# a prompt's token before each completion, one token of padding at the end
SEQUENCES = Sequences.on_one_rank(torch.tensor([0, 0, 0, 0, 1, 1, 2]), 2)
MASK = torch.tensor([0, 1, 1, 1, 0, 1, 0.0])
LOG = torch.tensor([0, math.log(4), math.log(0.5), math.log(0.5), 0, math.log(3), 0])


@pytest.mark.parametrize(
    ("mode", "expected", "above"),
    [
        ("token_truncate", [2, 0.5, 0.5, 2], [True, False, False, True]),
        ("token_mask", [0, 0.5, 0.5, 0], [True, False, False, True]),
        ("sequence_truncate", [1, 1, 1, 2], [False, False, False, True]),  # 4 * 1/2 * 1/2 = 1, and 3
        ("sequence_mask", [4, 0.5, 0.5, 0], [False, False, False, True]),
    ],
)
def test_the_four_corrections(mode, expected, above):
    found = rollout_weights(LOG, MASK, SEQUENCES, mode=mode, threshold=2.0)[MASK > 0]
    assert found.tolist() == pytest.approx(expected)
    assert is_corrected(LOG, MASK, SEQUENCES, mode=mode, threshold=2.0)[MASK > 0].tolist() == above


def test_ratios_outside_of_completions_count_for_nothing():
    huge = torch.tensor([1e9, -1.0, -60.0, 0])
    found = log_ratios(huge, torch.zeros(4), torch.tensor([0, 1, 1, 0.0]))
    assert found.tolist() == [0, -1, -20, 0]


def test_the_difference_of_two_distributions():
    found = difference(LOG, MASK, SEQUENCES)
    ratios = [4, 0.5, 0.5, 3]
    assert found.kl == pytest.approx(-sum(map(math.log, ratios)) / 4)
    assert found.k3 == pytest.approx(sum(r - math.log(r) - 1 for r in ratios) / 4)
    assert found.chi2_token == pytest.approx(sum(r * r for r in ratios) / 4 - 1)
    assert found.chi2_sequence == pytest.approx((1 + 9) / 2 - 1)
    assert found.largest == pytest.approx(math.log(4))


def test_effective_sample_size():
    """(2 + 1/2 + 1/2 + 2)² / (4 * (4 + 1/4 + 1/4 + 4)) = 25/34; equal weights are worth all."""
    weights = rollout_weights(LOG, MASK, SEQUENCES, mode="token_truncate", threshold=2.0)
    assert effective_sample_size(weights, MASK) == pytest.approx(25 / 34)
    assert effective_sample_size(torch.full((7,), 0.3), MASK) == pytest.approx(1)
    assert effective_sample_size(torch.zeros(7), MASK) == 0


def test_only_bad_completions_that_became_unlikely_are_too_far():
    old, now = torch.zeros(7), torch.tensor([9, -1, -2, -3, 9, -2, 9.0])  # means of 2 and 2
    for advantages, delta, expected in (
        ((-1.0, 1.0), 1.5, [True, False]),
        ((-1.0, -1.0), 1.5, [True, True]),
        ((-1.0, -1.0), 2.5, [False, False]),
    ):
        found = is_too_far(now, old, MASK, torch.tensor(advantages), SEQUENCES, delta=delta)
        assert found.tolist() == expected
