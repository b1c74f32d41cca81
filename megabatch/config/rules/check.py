"""Runs every rule, so that all faults are reported together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from megabatch.config.declare import group_types
from megabatch.config.layout import layout_of
from megabatch.config.new_model import declared_shape
from megabatch.config.recipe import Recipe
from megabatch.config.rules import (
    batches,
    datasets,
    extra_kwargs,
    grpo,
    mixing,
    models,
    muon,
    objectives,
    optimization,
    other_tasks,
    parallelism,
    pipeline,
    preference,
    recomputation,
    rewards,
    roles,
    rollout,
    rope,
    second_layouts,
    served_models,
    training,
    tuning,
    turns,
    watching,
    windows,
)
from megabatch.config.rules.fields import invalid_fields, unbuilt_fields
from megabatch.config.rules.secrets import no_secrets
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

Rule = Callable[[Recipe, ModelShape | None, Layout | None], Iterator[Fault]]

RULES: tuple[Rule, ...] = (
    *datasets.RULES,
    *training.RULES,
    *optimization.RULES,
    *recomputation.RULES,
    *objectives.RULES,
    *extra_kwargs.RULES,
    *models.RULES,
    *muon.RULES,
    *windows.RULES,
    *rope.RULES,
    *parallelism.RULES,
    *pipeline.RULES,
    *batches.RULES,
    *mixing.RULES,
    *other_tasks.RULES,
    *grpo.RULES,
    *rollout.RULES,
    *rewards.RULES,
    *preference.RULES,
    *second_layouts.RULES,
    *served_models.RULES,
    *roles.RULES,
    *tuning.RULES,
    *turns.RULES,
    *watching.RULES,
)
"""Rules between fields; each yields nothing where it has nothing to say."""


def check(
    recipe: Recipe,
    shape: ModelShape | None = None,
    *,
    variant_of: Recipe | None = None,
    values_are_valid: bool = False,
) -> list[Fault]:
    """Every fault of a recipe. Without `shape`, a new model is checked by the shape it declares.

    Args: variant_of: a recipe without faults; groups that it shares with this one (`dataclasses.replace` keeps all
    others) are not looked at field by field again, which is most of the time that checking many layouts takes.
    values_are_valid: every value was found to be of its type and range already.
    """
    wrong_groups = [
        Fault(name, None, f"must be a {group.__name__}, not {type(getattr(recipe, name)).__name__}", bare=True)
        for name, group in group_types(Recipe).items()
        if not isinstance(getattr(recipe, name), group)
    ]
    if wrong_groups:
        return wrong_groups
    invalid = [] if values_are_valid else list(invalid_fields(recipe, variant_of=variant_of))
    checkable = _with_defaults(recipe, {fault.field for fault in invalid})
    shape = shape or declared_shape(checkable)
    layout = layout_of(checkable, shape)
    unbuilt = unbuilt_fields(checkable, variant_of=variant_of)
    found = [*unbuilt, *(fault for rule in RULES for fault in rule(checkable, shape, layout))]
    found += no_secrets(checkable, variant_of=variant_of)
    reported = {fault.field for fault in invalid}
    return _once([*invalid, *(fault for fault in found if not _is_about(fault, reported))])


def _is_about(fault: Fault, fields: set[str]) -> bool:
    """Whether a rule between fields speaks of an invalid one: it saw the default in its place."""
    names = (field.rpartition(".")[2] for field in fields)
    return fault.field in fields or any(re.search(rf"\b{re.escape(name)}=", fault.rule) for name in names)


def _with_defaults(recipe: Recipe, fields: set[str]) -> Recipe:
    """The recipe with invalid fields at their defaults, so that rules between fields can compute."""
    changed: dict[str, Any] = {}
    for field in fields:
        group, _, name = field.partition(".")
        if name:
            current = changed.get(group, getattr(recipe, group))
            changed[group] = replace(current, **{name: type(current).__dataclass_fields__[name].default})
    return replace(recipe, **changed)


def _once(faults: list[Fault]) -> list[Fault]:
    """Without exact repetitions."""
    return list({str(fault): fault for fault in faults}.values())
