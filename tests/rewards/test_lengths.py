"""Rewards of form and length, against values worked out by hand and against the formulas of their sources."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.rewards.lengths import (
    Cosine,
    Format,
    Repetition,
    SoftOverlong,
    cosine_reward,
    format_reward,
    repetition_reward,
    soft_overlong_reward,
)
from megabatch.rewards.sample import RewardSample


def sample(text: str = "", *, ids: int = 0, turns: int = 1) -> RewardSample:
    return RewardSample(
        key="0/0/0",
        prompt=[{"role": "user", "content": f"question {turn}"} for turn in range(turns)],
        completion=text,
        ids=range(ids),
    )


_PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x", "</answer>\n"]), max_size=9
).map("".join)


@settings(deadline=None)
@given(_PIECES)
def test_format_is_ms_swifts_expression(text: str) -> None:
    expression = r"^<think>.*?</think>\s*<answer>.*?</answer>(?![\s\S])"
    assert format_reward(text) == float(bool(re.match(expression, text, re.DOTALL | re.MULTILINE)))


@pytest.mark.parametrize("text", ["<think></answer>", "<think></think><answer>", "</think><answer></answer>", ""])
def test_format_wants_all_four_tags(text: str) -> None:
    assert format_reward(text) == 0.0


def test_format_takes_time_linear_in_the_length() -> None:
    """ms-swift's expression needs minutes for this text."""
    assert format_reward("<think>" + "</think> <answer>" * 200_000) == 0.0


def test_repetition_counts_phrases_of_lower_case_words() -> None:
    # a b c a b c: phrases abc bca cab abc, three of four distinct
    assert repetition_reward("a b C A b c", size=3, largest=-1.0) == -0.25
    assert repetition_reward("a a a a", size=2, largest=-2.0) == pytest.approx(-2.0 * (1 - 1 / 3))
    assert repetition_reward("a b", size=3, largest=-1.0) == 0.0 == repetition_reward("", size=1, largest=-1.0)


def test_cosine_goes_from_one_end_to_the_other_and_stays() -> None:
    ends = {"longest": 100, "at_zero": 1.0, "at_longest": 0.5}
    assert [cosine_reward(n, **ends) for n in (0, 50, 100, 150)] == pytest.approx([1.0, 0.75, 0.5, 0.5])


@settings(deadline=None)
@given(st.integers(0, 100), st.floats(-2, 2), st.floats(-2, 2))
def test_cosine_is_the_published_formula(length: int, at_zero: float, at_longest: float) -> None:
    low, high = at_longest, at_zero  # ms-swift's cosfn(t, T, min_value, max_value)
    published = high - (high - low) * (1 - math.cos(length * math.pi / 100)) / 2
    assert cosine_reward(length, longest=100, at_zero=at_zero, at_longest=at_longest) == pytest.approx(published)


def test_cosine_chooses_its_ends_by_the_accuracy() -> None:
    cosine = Cosine(longest=10, wrong=(-0.5, 0.0), right=(1.0, 0.5))
    samples = [sample(ids=0), sample(ids=0), sample(ids=10), sample(ids=0)]
    assert cosine.of(samples, [1.0, 0.0, 0.0, math.nan])[:3] == pytest.approx([1.0, -0.5, 0.0])
    assert math.isnan(cosine.of(samples, [1.0, 0.0, 0.0, math.nan])[3])


def test_soft_overlong_is_dapos_equation_13() -> None:
    values = [soft_overlong_reward(n, longest=100, ramp=20) for n in (0, 80, 85, 100, 101, 500)]
    assert values == pytest.approx([0.0, 0.0, -0.25, -1.0, -1.0, -1.0])


@pytest.mark.parametrize("turns", [1, 3])
def test_lengths_are_tokens_whatever_the_number_of_turns(turns: int) -> None:
    one = sample("a a a", ids=90, turns=turns)
    assert SoftOverlong(100, 20).open()([one]) == [-0.5]
    assert Cosine(longest=180, wrong=(0.0, 1.0), right=(0.0, 0.0)).of([one], [0.0]) == pytest.approx([0.5])
    assert Repetition(1, -1.0).open()([one]) == pytest.approx([-2 / 3])
    assert Format().open()([one]) == [0.0]
