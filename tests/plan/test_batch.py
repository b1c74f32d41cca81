"""Batch arithmetic, against its own definitions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.plan.batch import grpo_batch, nearest_divisors, nearest_multiples, train_iters

small = st.integers(1, 300)


@given(st.integers(0, 300), small)
def test_nearest_multiples_are_the_neighbours(value, of):
    found = nearest_multiples(value, of=of)
    everything = range(of, value + of + 1, of)
    nearest = min(abs(multiple - value) for multiple in everything)
    assert all(multiple > 0 and multiple % of == 0 for multiple in found)
    assert all(abs(multiple - value) < max(of, nearest + 1) for multiple in found)
    assert abs(found[0] - value) == nearest
    assert list(found) == sorted(found, key=lambda multiple: abs(multiple - value))


@pytest.mark.parametrize(
    ("value", "of", "expected"), [(10, 8, (8, 16)), (15, 8, (16, 8)), (16, 8, (16,)), (3, 8, (8,)), (0, 8, (8,))]
)
def test_nearest_multiples(value, of, expected):
    assert nearest_multiples(value, of=of) == expected


@given(small, small)
def test_nearest_divisors_divide(value, of):
    found = nearest_divisors(value, of=of, count=of)
    assert sorted(found) == [divisor for divisor in range(1, of + 1) if of % divisor == 0 and divisor != value]
    assert nearest_divisors(value, of=of) == found[:2]


def test_nearest_divisors():
    assert nearest_divisors(6, of=64) == (4, 8)


@pytest.mark.parametrize(
    ("samples", "epochs", "batch", "steps"), [(7473, 1, 16, 467), (100, 3, 16, 18), (16, 1, 16, 1), (15, 1, 16, 0)]
)
def test_train_iters(samples, epochs, batch, steps):
    assert train_iters(samples, epochs=epochs, global_batch_size=batch) == steps


def test_grpo_numbers():
    """Eight completions of 16 prompts on dp 4, micro-batches of 2, three steps for each round."""
    batch = grpo_batch(global_batch_size=128, micro_batch_size=2, dp=4, num_generations=8, steps_per_generation=3)
    assert batch.generation_batch_size == 384
    assert batch.num_rollout_prompts == 48
    assert batch.num_train_prompts == 16
    assert batch.num_prompts_per_dp_group == 4


def test_grpo_fractions_are_exact():
    batch = grpo_batch(global_batch_size=8, micro_batch_size=1, dp=2, num_generations=8)
    assert batch.num_prompts_per_dp_group == Fraction(1, 2)


@given(small, st.integers(1, 8), st.integers(1, 8), st.integers(2, 8), st.integers(1, 4))
def test_grpo_formulas_agree(accumulation, micro, dp, generations, steps):
    batch = grpo_batch(
        global_batch_size=micro * dp * accumulation,
        micro_batch_size=micro,
        dp=dp,
        num_generations=generations,
        steps_per_generation=steps,
    )
    assert batch.num_rollout_prompts == batch.num_train_prompts * steps
    assert batch.num_prompts_per_dp_group * dp * generations == batch.global_batch_size
