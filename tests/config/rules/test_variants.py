"""Variants of a recipe are checked by what they changed, and found as if they were checked whole."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch.cli.recipe_file import load_recipe
from megabatch.config.declare import Parameter, parameters
from megabatch.config.field_types import choices
from megabatch.config.recipe import Recipe
from megabatch.config.rules.check import check
from megabatch.converters.families import family_of
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.shape import ModelShape

RECIPES = Path(__file__).parents[3] / "recipes"


def of(name: str) -> tuple[Recipe, ModelShape | None]:
    recipe = load_recipe(RECIPES / name)()
    assert isinstance(recipe, Recipe)
    config = KNOWN_MODELS.get(recipe.model.model or "")
    return recipe, None if config is None else family_of(config).shape(config)


def others(parameter: Parameter, value: Any) -> list[Any]:
    """Other values, of which some are invalid."""
    if isinstance(value, bool):
        return [not value]
    if named := [one for one in choices(parameter.hint) if one != value]:
        return named[-1:]
    if isinstance(value, int | float):
        return [value + 1]
    if isinstance(value, str):
        return [f"{value}x"]
    return [2, ("x",)] if value is None else [None]


def changed(recipe: Recipe, *given: tuple[Parameter, Any]) -> Recipe:
    for parameter, value in given:
        group = replace(getattr(recipe, parameter.group), **{parameter.name: value})
        recipe = replace(recipe, **{parameter.group: group})
    return recipe


@pytest.mark.parametrize("name", ["qwen3_moe_sft.py", "qwen3_moe_lora.py", "qwen3_moe_grpo.py", "gsm8k_dpo.py"])
def test_a_variant_has_the_faults_of_a_recipe(name: str) -> None:
    recipe, shape = of(name)
    single = [
        (parameter, value)
        for parameter in parameters(Recipe)
        for value in others(parameter, getattr(getattr(recipe, parameter.group), parameter.name))
    ]
    rng = random.Random(0)
    faulty = 0
    for given in [*((one,) for one in single), *(tuple(rng.sample(single, 3)) for _ in range(150))]:
        variant = changed(recipe, *given)
        found = check(variant, shape, variant_of=recipe)
        assert found == check(variant, shape), given
        faulty += bool(found)
    assert faulty > 100


def test_a_variant_of_a_recipe_with_faults_keeps_those_that_it_did_not_mend() -> None:
    recipe, shape = of("qwen3_moe_sft.py")
    wrong = replace(recipe, batch=replace(recipe.batch, global_batch_size=7, micro_batch_size=2))
    assert check(wrong, shape)
    for given in ({"nodes": 2}, {"gpus_per_node": 6}, {"tasks_per_node": 4}):
        variant = replace(wrong, resources=replace(wrong.resources, **given))
        assert check(variant, shape, variant_of=wrong) == check(variant, shape)
    mended = replace(wrong, batch=recipe.batch)
    assert check(mended, shape, variant_of=wrong) == check(mended, shape) == []
