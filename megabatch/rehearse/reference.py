"""The same small run twice: with the recipe's layout, and in one process, made so that only the layout can differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megabatch.config.declare import parameters
from megabatch.config.optimization import undistributed
from megabatch.config.parallel import Parallel
from megabatch.config.recipe import Recipe
from megabatch.config.recompute import Recompute
from megabatch.rehearse.shrink import Small

LEARNING_RATE = 0.3

_GRADIENT_STEPS: dict[str, dict[str, Any]] = {
    "optimizer": {"optimizer": "adam", "adam_eps": 1.0, "weight_decay": 0.0, "clip_grad": 0.0},
    "learning_rate": {
        "lr": LEARNING_RATE, "min_lr": LEARNING_RATE, "lr_decay_style": "constant", "lr_warmup_fraction": None,
        "lr_warmup_iters": 0, "lr_decay_iters": None,
    },
}  # fmt: skip
"""With such a large epsilon a step is about the gradient times a constant: weights show every tensor's gradient."""
_NUMBERS: dict[str, dict[str, Any]] = {
    "model": {"torch_dtype": "float32", "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "precision": {"fp16": None, "bf16": None},
    "optimizer": {
        "use_precision_aware_optimizer": False, "main_grads_dtype": "fp32", "exp_avg_dtype": "fp32",
        "exp_avg_sq_dtype": "fp32",
    },
}  # fmt: skip
_ADAPTERS: dict[str, dict[str, Any]] = {"tuner": {"lora_dropout": 0.0}}
_SAVES: dict[str, dict[str, Any]] = {
    "checkpoint": {"save_interval": 1, "no_save_optim": True, "async_save": False},
}
_REASONS = {
    "optimizer.optimizer": "so that weights tell the gradients",
    "optimizer.adam_eps": "so that weights tell the gradients",
    "optimizer.main_grads_dtype": "rounding to fewer bits differs with the layout",
    "model.torch_dtype": "rounding to fewer bits differs with the layout",
    "model.attention_dropout": "random numbers differ with the layout",
    "model.hidden_dropout": "random numbers differ with the layout",
    "tuner.lora_dropout": "random numbers differ with the layout",
}
"""Changes that we report."""


def comparable(small: Small) -> Small:
    """The recipe in fp32, without random numbers, with steps that are nearly proportional to the gradient."""
    recipe, notes = small.recipe, list(small.left_out)
    adapters = _ADAPTERS if recipe.tuner.tuner_type == "lora" else {}
    for groups in (_GRADIENT_STEPS, _without_muon(), _NUMBERS, _SAVES, adapters):
        for group, fields in groups.items():
            notes += _notes(recipe, group, fields)
            recipe = replace(recipe, **{group: replace(getattr(recipe, group), **fields)})
    return Small(recipe, tuple(notes))


def _without_muon() -> dict[str, dict[str, Any]]:
    """Muon's parameters, which no other optimizer takes, at their defaults."""
    return {"optimizer": {found.name: found.default for found in parameters(Recipe) if found.name.startswith("muon_")}}


def _notes(recipe: Recipe, group: str, fields: dict[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        given, reason = getattr(getattr(recipe, group), name), _REASONS.get(f"{group}.{name}")
        if reason is not None and given not in (value, None):
            yield f"{group}.{name}={given!r}: {value!r} here, {reason}"


def in_one_process(recipe: Recipe) -> Recipe:
    """The reference: no parallelism, no recomputation, no optimizer in host memory, and one pack per micro-batch if
    that changes no loss."""
    alone = replace(
        recipe,
        parallel=Parallel(distributed_backend="gloo", use_distributed_optimizer=False),
        optimizer=undistributed(recipe.optimizer),
        recompute=Recompute(recompute_granularity="none"),
        resources=replace(recipe.resources, tasks_per_node=1),
    )
    if recipe.moe.num_experts is None and recipe.training.calculate_per_token_loss:
        alone = replace(alone, batch=replace(alone.batch, micro_batch_size=1))
    return alone
