"""Rules for rewards: each is known, has what it needs and its weight; settings that no reward reads are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch import Recipe
from megabatch.config.grpo import Grpo
from megabatch.config.rewards import SHIPPED
from megabatch.config.rlhf import Rlhf
from megabatch.config.rules.rewards import RULES
from megabatch.rewards.named import NAMED, rewards_of


def recipe(**grpo: Any) -> Recipe:
    return Recipe(name="r", task="rlhf", rlhf=Rlhf(rlhf_type="grpo"), grpo=Grpo(**grpo))


def said(one: Recipe) -> list[str]:
    return [str(fault) for rule in RULES for fault in rule(one, None, None)]


@pytest.mark.parametrize(
    ("grpo", "expected"),
    [
        ({"reward_funcs": ("accuracy", "r.py:f"), "reward_weights": (1.0, 0.5)}, None),
        ({"reward_funcs": ("acuracy",)}, "grpo.reward_funcs='acuracy' must be one of accuracy, "),
        (
            {"reward_funcs": ("format",), "reward_weights": (1.0, 2.0)},
            "must have one weight for each of the 1 rew",
        ),
        ({"reward_funcs": ("a.py:f", "b.py:f")}, "'b.py:f' is a second reward of the name f"),
        (
            {"reward_funcs": ("format",), "cosine_max_len": 9},
            "cosine_max_len=9 has no effect without the reward",
        ),
        (
            {"reward_funcs": ("soft_overlong",)},
            "grpo.soft_cache_length is missing: soft_overlong needs the tokens",
        ),
        (
            {"reward_funcs": ("soft_overlong",), "soft_max_length": 100, "soft_cache_length": 200},
            "soft_cache_length=200 must be at most soft_max_length=100; try 25",
        ),
    ],
)
def test_a_fault_is_named(grpo: dict[str, Any], expected: str | None) -> None:
    found = said(recipe(**grpo))
    assert not found if expected is None else len(found) == 1 and expected in found[0]


def test_other_tasks_hear_nothing() -> None:
    assert not said(replace(recipe(reward_funcs=("nothing",), reward_weights=(1.0, 2.0)), task="sft"))


def test_every_shipped_reward_can_be_made() -> None:
    one = recipe(reward_funcs=SHIPPED, soft_cache_length=10)
    assert not said(one) and tuple(NAMED) == SHIPPED
    with rewards_of(one) as rewards:
        assert rewards.names == SHIPPED and rewards.weights == (1.0,) * len(SHIPPED)
