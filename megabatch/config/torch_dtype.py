"""The number type of a run's weights."""

from __future__ import annotations

from typing import Any

from megabatch.config.recipe import Recipe
from megabatch.plan.shape import ModelShape


def torch_dtype(recipe: Recipe, shape: ModelShape) -> Any:
    """From the recipe, its precision flags, or config.json (`torch_dtype`; `dtype` since transformers 5)."""
    if recipe.model.torch_dtype:
        return recipe.model.torch_dtype
    if recipe.precision.fp16 or recipe.precision.bf16:
        return "float16" if recipe.precision.fp16 else "bfloat16"
    declared = str(shape.hf_config.get("torch_dtype") or shape.hf_config.get("dtype") or "bfloat16")
    return declared.removeprefix("torch.")
