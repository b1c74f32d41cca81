"""The table of tasks agrees with the choices that recipes declare."""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

import megabatch
from megabatch.config.recipe import Recipe
from megabatch.config.rlhf import Rlhf
from megabatch.config.training import Training
from megabatch.tasks import TASKS, find_task


def _choices(group: type, name: str) -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(group)[name])


def test_every_choice_of_a_recipe_has_a_task_and_no_other_name_has():
    assert {task.task for task in TASKS} == set(_choices(Recipe, "task"))
    assert {task.rlhf_type for task in TASKS} - {None} == set(_choices(Rlhf, "rlhf_type"))
    assert {task.task_type for task in TASKS} == set(_choices(Training, "task_type"))


def test_the_parameters_of_an_algorithm_are_the_group_of_its_name():
    groups = {field.name for field in dataclasses.fields(Recipe)}
    assert {task.name for task in TASKS if task.task == "rlhf"} <= groups


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (("pt", "dpo", "causal_lm"), "pt"),
        (("sft", "dpo", "causal_lm"), "sft"),
        (("sft", "dpo", "embedding"), "embedding"),
        (("rlhf", "grpo", "causal_lm"), "grpo"),
        (("pt", "dpo", "seq_cls"), None),
        (("rlhf", "none", "causal_lm"), None),
    ],
)
def test_what_a_recipe_says_is_one_task(said, name):
    task, rlhf_type, task_type = said
    found = find_task(task, rlhf_type=rlhf_type, task_type=task_type)
    assert (found.name if found else None) == name


def test_nobody_else_asks_which_task_a_recipe_has() -> None:
    """What differs between tasks is a field of the table; a recipe's `task` is compared where it is checked alone."""
    package = Path(megabatch.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            left = node.left if isinstance(node, ast.Compare) else None
            if (
                isinstance(left, ast.Attribute)
                and left.attr == "task"
                and isinstance(node.comparators[0], ast.Constant)
            ):
                found.append(path.relative_to(package).as_posix())
    assert found == ["config/rules/objectives.py"], "task_and_algorithm_agree"
