"""Settings of an objective are refused where a recipe trains towards another one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from megabatch import Recipe
from megabatch.config.rules.check import check
from megabatch.tasks import TASKS

GRPO = {"rlhf": {"rlhf_type": "grpo"}, "task": "rlhf"}


@pytest.mark.parametrize(
    ("field", "value", "about", "rule"),
    [
        ("grpo.num_generations", 4, {"task": "sft"}, "has no effect on sft; it is for grpo"),
        ("rollout.temperature", 0.5, {"task": "sft"}, "has no effect on sft; it is for gkd, grpo"),
        ("dpo.beta", 0.2, GRPO, "has no effect on grpo; it is for dpo"),
        ("gkd.gkd_logits_topk", 4, GRPO, "has no effect on grpo; it is for gkd"),
        ("gkd.lmbda", 0.2, GRPO, "has no effect on grpo; it is for gkd"),
        ("reranker.loss_type", "listwise_reranker", {"task": "sft"}, "has no effect on sft; it is for reranker, gen"),
        ("rewards.reward_workers", 3, {"task": "rlhf", "rlhf": {"rlhf_type": "dpo"}}, "has no effect on dpo; it is"),
    ],
)
def test_a_setting_of_another_task_is_refused(
    field: str, value: Any, about: dict[str, Any], rule: str, dense: Recipe, changed: Any
) -> None:
    group, name = field.split(".")
    found = [fault for fault in check(changed(dense, {**about, group: {name: value}})) if fault.field == field]
    assert [fault.rule[: len(rule)] for fault in found] == [rule]
    default = next(one.default for one in fields(getattr(dense, group)) if one.name == name)
    assert list(found[0].try_) == [default]


def test_a_task_reads_groups_that_a_recipe_has() -> None:
    for task in TASKS:
        assert set(task.groups) <= {field.name for field in fields(Recipe)}, task.name


@pytest.mark.parametrize("teacher", [{"teacher_model": "x/y"}, {"teacher_model_server": "http://h:1"}])
def test_a_teacher_is_for_both_tasks_that_have_one(teacher: dict[str, str], dense: Recipe, changed: Any) -> None:
    for name in ("gkd", "grpo"):
        recipe = changed(dense, {"task": "rlhf", "rlhf": {"rlhf_type": name}, "gkd": teacher})
        assert not [fault for fault in check(recipe) if "has no effect on" in fault.rule]
