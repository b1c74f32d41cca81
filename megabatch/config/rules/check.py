"""Runs every rule, so that all faults are reported together."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
from megabatch.config.rules.fields import differing_parameters, invalid_fields, unbuilt_fields
from megabatch.config.rules.secrets import no_secrets
from megabatch.config.rules.variants import Rule, Seen
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

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

    Args: variant_of: a recipe without invalid values; those that it shares with this one are not looked at again, nor
    do rules look again that read nothing else (`dataclasses.replace` keeps all other groups): checking many layouts
    takes a fraction of the time.
    values_are_valid: every value was found to be of its type and range already.
    """
    wrong_groups = [
        Fault(name, None, f"must be a {group.__name__}, not {type(getattr(recipe, name)).__name__}", bare=True)
        for name, group in group_types(Recipe).items()
        if not isinstance(getattr(recipe, name), group)
    ]
    if wrong_groups:
        return wrong_groups
    among = None if variant_of is None else tuple(differing_parameters(recipe, variant_of))
    invalid = [] if values_are_valid else list(invalid_fields(recipe, among=among))
    checkable = _with_defaults(recipe, {fault.field for fault in invalid})
    shape = shape or declared_shape(checkable)
    layout = layout_of(checkable, shape)
    unbuilt = unbuilt_fields(checkable, among=among)
    found = [*unbuilt, *_between_fields(checkable, shape, layout, variant_of=variant_of)]
    found += no_secrets(checkable, among=among)
    reported = {fault.field for fault in invalid}
    return _once([*invalid, *(fault for fault in found if not _is_about(fault, reported))])


_last: list[Seen] = []
"""What the rules found in the recipe whose variants are being checked."""


def _between_fields(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None, *, variant_of: Recipe | None
) -> Iterator[Fault]:
    if variant_of is not None and not (_last and _last[0].recipe is variant_of):
        _last[:] = [Seen(variant_of, shape, RULES)]
    if variant_of is not None and _last[0].shape == shape:
        return _last[0].faults(recipe, layout)
    return (fault for rule in RULES for fault in rule(recipe, shape, layout))


def _is_about(fault: Fault, fields: set[str]) -> bool:
    """Whether a rule between fields speaks of an invalid one: it saw the default in its place."""
    names = (field.rpartition(".")[2] for field in fields)
    return fault.field in fields or any(re.search(rf"\b{re.escape(name)}=", fault.rule) for name in names)


def _with_defaults(recipe: Recipe, fields: set[str]) -> Recipe:
    """The recipe with invalid fields at their defaults, so that rules between fields can compute."""
    if not fields:
        return recipe
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
