"""Which implementation of layers a run gets: Transformer Engine's, or megatron-core's local ones with torch attention.

Rules, plans, defaults and the trainer ask here. A run that may have Transformer Engine's layers has local ones all the
same where, once it starts, the package or a CUDA device is missing (`trainer.model.transformer_config`).
"""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.recipe import Recipe
from megabatch.config.torch_dtype import torch_dtype
from megabatch.plan.shape import ModelShape


def why_local(recipe: Recipe, shape: ModelShape | None, *, shares_prompts: bool) -> str | None:
    """Why a run has local layers, as far as its recipe and its model say; None where they do not ask for them.

    Args: shape: None where it is not known; shares_prompts: `shared_prompts.shares_prompts`.
    """
    if shares_prompts:
        return "share_prompts: they alone compute a prompt once for all its answers"
    return next((reason for find in _REASONS if (reason := find(recipe, shape)) is not None), None)


def _wanted(recipe: Recipe, shape: ModelShape | None) -> str | None:
    return "transformer_impl='local'" if recipe.kernels.transformer_impl == "local" else None


def _device(recipe: Recipe, shape: ModelShape | None) -> str | None:
    return None if recipe.resources.gpus_per_node else "gpus_per_node=0"


def _biases_alone(recipe: Recipe, shape: ModelShape | None) -> str | None:
    if recipe.tuner.tuner_type != "lora" or recipe.tuner.lora_bias != "all":
        return None
    return "lora_bias='all' trains biases beside frozen weights, which have their gradients there alone"


def _dtype(recipe: Recipe, shape: ModelShape | None) -> str | None:
    dtype = recipe.model.torch_dtype if shape is None else torch_dtype(recipe, shape)
    return "Transformer Engine has no attention of packed rows in fp32" if dtype == "float32" else None


def _biases(recipe: Recipe, shape: ModelShape | None) -> str | None:
    if shape is None or not (shape.attention_output_bias or shape.mlp_bias):
        return None
    return "megatron-core's Transformer Engine layers lack some of this model's biases"


_REASONS: tuple[Callable[[Recipe, ModelShape | None], str | None], ...] = (
    _wanted,
    _device,
    _biases_alone,
    _dtype,
    _biases,
)
