"""Rules for rewards: each is known, has what it needs and its weight; settings that no reward reads are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch import Recipe
from megabatch.config.grpo import Grpo
from megabatch.config.rewards import SHIPPED, Rewards
from megabatch.config.rlhf import Rlhf
from megabatch.config.roles import Role
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


def test_settings_of_code_and_judge_need_their_reward() -> None:
    one = recipe(reward_funcs=("format", "judge"))
    assert said(one) == [
        "rewards.judge_base_url is missing: the reward judge needs it",
        "rewards.judge_model is missing: the reward judge needs it",
    ]
    judged = replace(one, rewards=Rewards(judge_base_url="role:critic", judge_model="m", code_memory_mib=99))
    assert said(judged) == [
        "rewards.code_memory_mib=99 has no effect without the reward code; try reward_funcs=code",
        "rewards.judge_base_url='role:critic' must name one of the recipe's roles, which has none",
    ]
    assert len(said(replace(judged, roles=(Role(name="critic", command=("serve",)),)))) == 1


def test_settings_of_process_rewards_need_a_reward_model() -> None:
    one = replace(recipe(reward_funcs=("format",)), rewards=Rewards(reward_step_aggregation="last"))
    assert said(one) == [
        "rewards.reward_step_aggregation='last' has no effect without grpo.reward_model, of which it concerns process "
        "reward models; try min"
    ]
    assert not said(replace(one, grpo=replace(one.grpo, reward_model=("a/prm",))))


def test_plugins_are_one_for_each_model() -> None:
    one = recipe(reward_funcs=("format",), reward_model=("a/rm", "b/rm2"), reward_model_plugin=("default",))
    assert "must be one for each of the 2 reward models" in said(one)[0]


def test_other_tasks_hear_nothing() -> None:
    assert not said(replace(recipe(reward_funcs=("nothing",), reward_weights=(1.0, 2.0)), task="sft"))


def test_every_shipped_reward_can_be_made() -> None:
    settings = Rewards(judge_base_url="http://localhost/v1", judge_model="m")
    one = replace(recipe(reward_funcs=SHIPPED, soft_cache_length=10), rewards=settings)
    assert not said(one) and tuple(NAMED) == SHIPPED
    with rewards_of(one) as rewards:
        assert rewards.names == SHIPPED and rewards.weights == (1.0,) * len(SHIPPED)
