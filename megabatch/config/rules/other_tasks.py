"""Settings of objectives that a recipe does not train towards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.tasks import TASKS

_OF_ONE = {
    "gkd": {
        "grpo": (
            "beta", "lmbda", "seq_kd", "sft_alpha", "teacher_tag_key", "gkd_logits_topk",
        ),
    },
}  # fmt: skip
"""Fields of a group that one of its tasks does not read, by group and task."""


def settings_of_other_tasks_are_not_given(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    if recipe.kind is None:
        return
    name, own = recipe.kind.name, recipe.kind.groups
    for group in sorted({group for task in TASKS for group in task.groups}):
        left_out = _OF_ONE.get(group, {}).get(name, ()) if group in own else None
        values = getattr(recipe, group)
        for field in fields(values):
            if left_out is not None and field.name not in left_out:
                continue
            if (value := getattr(values, field.name)) != field.default:
                readers = [task.name for task in TASKS if group in task.groups and task.name != name]
                rule = f"has no effect on {name}; it is for {', '.join(readers)}"
                yield Fault(f"{group}.{field.name}", value, rule, try_=(field.default,))


RULES = (settings_of_other_tasks_are_not_given,)
