"""Tokens of a sample and of a row, for a recipe whose lengths may be left out."""

from __future__ import annotations

from megabatch.config.recipe import Recipe
from megabatch.plan.shape import ModelShape


def sample_tokens(recipe: Recipe, shape: ModelShape | None) -> int | None:
    """Longest sample: `data.max_length`, or what the model takes; None where neither is known. A prompt leaves room
    for a token of its completion."""
    if recipe.data.max_length is not None or shape is None:
        return recipe.data.max_length
    return shape.max_position_embeddings - generates(recipe)


def generates(recipe: Recipe) -> bool:
    """Whether a recipe's rows are prompts, which its model answers."""
    return recipe.kind is not None and recipe.kind.rows == "prompts"


def row_tokens(recipe: Recipe, shape: ModelShape | None) -> int | None:
    """Longest row of one packed or plain sample: `data.packing_length` with packing, else the longest sample; of a
    prompt with its completion."""
    longest = sample_tokens(recipe, shape)
    if generates(recipe) and longest is not None:
        whole = longest + recipe.rollout.max_completion_length
        return whole if shape is None else min(whole, shape.max_position_embeddings)
    return recipe.data.packing_length or longest


def item_tokens(recipe: Recipe, shape: ModelShape | None) -> int | None:
    """Most tokens of what a batch counts: a row, or without packing both answers of a pair. What these share is not
    known before the data, and may be a prompt of one token."""
    row = row_tokens(recipe, shape)
    is_pair = recipe.kind is not None and recipe.kind.rows == "pairs" and not recipe.data.packing
    return 2 * row if row is not None and is_pair else row


def positions(recipe: Recipe, shape: ModelShape) -> int:
    """Tokens that the model takes, and the rollout engine inside the ranks."""
    return min(shape.max_position_embeddings, recipe.rollout.vllm_max_model_len or shape.max_position_embeddings)
