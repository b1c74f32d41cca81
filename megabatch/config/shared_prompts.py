"""Whether the answers to a prompt share its tokens in a row, and why not: where that would change numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from megabatch.config.grpo_defaults import filled, infers
from megabatch.config.layer_implementation import why_local
from megabatch.config.recipe import Recipe
from megabatch.plan.shape import ModelShape

_TASKS = ("dpo", "rm", "reranker", "grpo")


def shares_prompts(recipe: Recipe, shape: ModelShape | None) -> bool:
    """`rlhf.share_prompts`, or its default: wherever that changes no number."""
    wanted = recipe.rlhf.share_prompts
    return why_not(recipe, shape) is None if wanted is None else wanted


def why_local_layers(recipe: Recipe, shape: ModelShape | None) -> str | None:
    """`layer_implementation.why_local` of a recipe whose `share_prompts` may not be resolved yet."""
    return why_local(recipe, shape, shares_prompts=shares_prompts(recipe, shape))


def compares_answers(recipe: Recipe) -> bool:
    """Whether a recipe's task compares answers to one prompt."""
    return _task(recipe) in _TASKS


def answers_in_a_row(recipe: Recipe) -> int:
    """GRPO's completions of one prompt that lie in one row of a step: as many as divide both its group and a
    micro-batch, so that every micro-batch has as many completions as without sharing."""
    return math.gcd(recipe.grpo.num_generations, recipe.batch.micro_batch_size)


def inferred_answers_in_a_row(recipe: Recipe) -> int:
    """The same in a pass for log-probabilities."""
    return math.gcd(recipe.grpo.num_generations, infer_batch_size(recipe))


def infer_batch_size(recipe: Recipe) -> int:
    """`grpo.infer_batch_size`, or its default."""
    return recipe.grpo.infer_batch_size or recipe.batch.micro_batch_size


def infers_alone(recipe: Recipe) -> bool:
    """Whether passes of GRPO only compute log-probabilities, so that `infer_batch_size` has a use."""
    grpo = filled(recipe.grpo, recipe.rollout, global_batch_size=recipe.batch.global_batch_size)
    has_reference = grpo.beta > 0 and recipe.rlhf.ref_model_server is None
    has_frozen = has_reference or recipe.gkd.teacher_model is not None
    return infers(grpo, has_dropout=bool(dropouts(recipe)), has_frozen=has_frozen)


def why_not(recipe: Recipe, shape: ModelShape | None) -> str | None:
    """Why every answer has its prompt for itself; None where all may share it."""
    if not compares_answers(recipe):
        return f"it is for {', '.join(_TASKS)}"
    return next((reason for find in _REASONS if (reason := find(recipe, shape)) is not None), None)


def _task(recipe: Recipe) -> str | None:
    return None if recipe.kind is None else recipe.kind.name


def _layers(recipe: Recipe, shape: ModelShape | None) -> str | None:
    if recipe.tuner.tuner_type == "lora" or why_local(recipe, shape, shares_prompts=False) is not None:
        return None
    wanted = recipe.kernels.transformer_impl
    return f"transformer_impl={wanted!r} has no attention over tokens of another sequence; 'local' has"


def _padding(recipe: Recipe, shape: ModelShape | None) -> str | None:
    return None if recipe.data.padding_free else "padding_free=False makes all sequences of a row equally long"


def dropouts(recipe: Recipe) -> dict[str, float]:
    """The shares by which training drops something, those above 0."""
    found = {"attention_dropout": recipe.model.attention_dropout, "hidden_dropout": recipe.model.hidden_dropout}
    if recipe.tuner.tuner_type == "lora":
        found["lora_dropout"] = recipe.tuner.lora_dropout
    return {name: share for name, share in found.items() if share}


def _dropout(recipe: Recipe, shape: ModelShape | None) -> str | None:
    dropped = [f"{name}={share:g}" for name, share in dropouts(recipe).items()]
    return f"{dropped[0]} drops other parts of the prompt for each answer" if dropped else None


def _experts(recipe: Recipe, shape: ModelShape | None) -> str | None:
    """What depends on how many tokens go to an expert counts a prompt's tokens once for each answer."""
    moe = recipe.moe
    if shape is None or shape.num_experts is None:
        return None
    found = {"moe_z_loss_coeff": moe.moe_z_loss_coeff, "moe_expert_capacity_factor": moe.moe_expert_capacity_factor}
    if moe.moe_router_load_balancing_type != "none":
        found["moe_aux_loss_coeff"] = moe.moe_aux_loss_coeff
    counted = [f"{name}={value:g}" for name, value in found.items() if value]
    return f"{counted[0]} counts the prompt's tokens once for each answer" if counted else None


def _groups(recipe: Recipe, shape: ModelShape | None) -> str | None:
    if _task(recipe) != "grpo":
        return None
    if recipe.grpo.loss_type == "bnpo":
        return "loss_type='bnpo' depends on which completions lie in a micro-batch, as they are dealt one by one"
    micro, group = recipe.batch.micro_batch_size, recipe.grpo.num_generations
    if answers_in_a_row(recipe) == 1 and inferred_answers_in_a_row(recipe) == 1:
        return f"micro_batch_size={micro} and num_generations={group} have no common divisor"
    return None


_REASONS: tuple[Callable[[Recipe, ModelShape | None], str | None], ...] = (
    _layers,
    _padding,
    _dropout,
    _experts,
    _groups,
)
