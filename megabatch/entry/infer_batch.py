"""How many completions lie in a micro-batch of GRPO's passes for log-probabilities, where the recipe does not say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Any

from megabatch.config.layout import chunks_of, virtual_stages
from megabatch.config.lengths import generates, sample_tokens
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.config.second_layouts import REFERENCE, TEACHER, Role, parallel_of
from megabatch.config.second_layouts import layout_of as own_layout_of
from megabatch.config.several_teachers import models_named
from megabatch.config.shared_prompts import (
    inferred_answers_in_a_row,
    infers_alone,
    shares_prompts,
    why_local_layers,
)
from megabatch.entry.estimate import settings_of, teacher_shape
from megabatch.plan.batch import grpo_batch
from megabatch.plan.memory import most_without_gradients
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape

MOST = 16
"""Completions of a micro-batch, or as many as a prompt has where these are more: beyond, passes gain nothing."""


def default_infer_batch_size(recipe: Recipe, shape: ModelShape) -> int | None:
    """Of a recipe without faults; None where it gives a size, or has no pass for log-probabilities.

    No larger than what keeps the run's peak of memory that of a training step, by the plan. Among those, the one whose
    pass computes the fewest tokens: completions of a prompt in one row share its tokens, and a pipeline of fewer
    micro-batches waits longer. Of equals the largest.
    """
    if recipe.grpo.infer_batch_size is not None or not generates(recipe) or not infers_alone(recipe):
        return None
    micro = recipe.batch.micro_batch_size
    if _depends_on_the_rest(recipe):
        return micro
    fits = _most(recipe, shape)
    sizes = [size for size in _sizes(recipe) if micro < size <= fits]
    return min([micro, *sizes], key=lambda size: (_cost(recipe, shape, size), -size))


def with_infer_batch_size(recipe: Recipe, shape: ModelShape, size: int) -> Recipe:
    """The recipe with this size, and the layers that the run has without it."""
    found = replace(recipe, grpo=replace(recipe.grpo, infer_batch_size=size))
    if (why_local_layers(found, shape) is None) == (why_local_layers(recipe, shape) is None):
        return found
    return replace(found, rlhf=replace(found.rlhf, share_prompts=False))


def _depends_on_the_rest(recipe: Recipe) -> bool:
    """Whether a completion's cost or numbers depend on those beside it: all are padded to the longest, or compete for
    the room of an expert."""
    return not recipe.data.padding_free or recipe.moe.moe_expert_capacity_factor is not None


def _sizes(recipe: Recipe) -> Iterator[int]:
    """Whole prompts, or an equal part of one's completions, up to what a rank has in a round."""
    group, most = recipe.grpo.num_generations, min(max(MOST, recipe.grpo.num_generations), _completions(recipe))
    return (size for size in range(1, most + 1) if size % group == 0 or group % size == 0)


def _completions(recipe: Recipe) -> int:
    """Of a round, on each data parallel rank."""
    parallel, grpo = recipe.parallel, recipe.grpo
    model = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    dp = recipe.resources.world_size // model
    batch = grpo_batch(
        global_batch_size=recipe.batch.global_batch_size,
        micro_batch_size=recipe.batch.micro_batch_size,
        dp=dp,
        num_generations=grpo.num_generations,
        steps_per_generation=grpo.steps_per_generation,
        generation_batch_size=grpo.generation_batch_size,
    )
    return batch.generation_batch_size // dp


def _cost(recipe: Recipe, shape: ModelShape, size: int) -> float:
    """Tokens that a pass computes for each completion of full length, and those for which stages wait."""
    sized = with_infer_batch_size(recipe, shape, size)
    in_a_row = inferred_answers_in_a_row(sized) if shares_prompts(sized, shape) else 1
    tokens = resolved(sample_tokens(recipe, shape)) / in_a_row + recipe.rollout.max_completion_length
    waits = (recipe.parallel.pipeline_model_parallel_size - 1) / virtual_stages(recipe.parallel, shape.num_layers)
    return tokens * (1 + waits / ceil(_completions(recipe) / size))


def _most(recipe: Recipe, shape: ModelShape) -> int:
    """By memory, for every model whose log-probabilities are computed in the ranks; 0 where one is not known."""
    settings = settings_of(recipe, shape)
    found = [most_without_gradients(shape, settings, other=shape, others=settings)]
    beside: list[tuple[Role, ModelShape | None]] = []
    if recipe.grpo.beta > 0 and REFERENCE.given(recipe):
        beside.append((REFERENCE, shape))
    beside += [(TEACHER, teacher_shape(recipe, name)) for name in models_named(recipe.gkd.teacher_model)]
    for role, other in beside:
        others = None if other is None else _split_as(recipe, role, other, settings)
        if other is None or others is None:
            return 0
        found.append(most_without_gradients(shape, settings, other=other, others=others))
    return min(found)


def _split_as(recipe: Recipe, role: Role, shape: ModelShape, settings: Settings) -> Settings | None:
    """The settings of a frozen model beside the trained one; None where it does not divide."""
    parallel = parallel_of(recipe, role, has_experts=shape.num_experts is not None)
    layout, chunks = own_layout_of(recipe, parallel), chunks_of(parallel, shape.num_layers)
    if layout is None or chunks is None:
        return None
    changes: dict[str, Any] = {
        "layout": layout,
        "chunks": chunks,
        "sequence_parallel": parallel.sequence_parallel,
        "vocab_size": -(-shape.vocab_size // layout.tp) * layout.tp,
        "mtp_layers": 0,
        "lora": None,
        "frozen": frozenset(),
    }
    return replace(settings, **changes)
