"""Which weights a policy is compared with, as a recipe names them."""

from __future__ import annotations

from typing import NamedTuple

from megabatch.config.recipe import Recipe


class ReferenceWeights(NamedTuple):
    """A reference as a model of its own. With neither model nor checkpoint it is the recipe's model."""

    model: str | None
    """`ref_model`: a Hugging Face folder or hub name."""
    checkpoint: str | None
    """In megatron-core's format: `ref_load`, else `load`."""
    adapter: str | None
    """`ref_adapters` or `ref_adapter_load`."""


def reference_weights(recipe: Recipe) -> ReferenceWeights:
    """The reference's weights: those that a recipe names, else those that the policy begins with."""
    adapters = [*recipe.bridge.ref_adapters, *filter(None, [recipe.rlhf.ref_adapter_load])]
    model, checkpoint = recipe.bridge.ref_model, recipe.rlhf.ref_load
    if model is None and checkpoint is None:
        checkpoint = recipe.checkpoint.load
    return ReferenceWeights(model, checkpoint, adapters[0] if adapters else None)


def is_second_model(recipe: Recipe) -> bool:
    """Whether the reference has weights of its own in memory: always in full training, with LoRA if the recipe names
    them; otherwise it is the policy with another adapter or none, or behind a server."""
    if recipe.rlhf.ref_model_server is not None:
        return False
    named = recipe.bridge.ref_model is not None or recipe.rlhf.ref_load is not None
    return named or recipe.tuner.tuner_type != "lora"


def references_named(recipe: Recipe) -> dict[str, object]:
    """What a recipe says of a reference besides the policy itself, by field; without what it leaves out."""
    given: dict[str, object] = {
        "bridge.ref_model": recipe.bridge.ref_model,
        "rlhf.ref_load": recipe.rlhf.ref_load,
        "bridge.ref_adapters": recipe.bridge.ref_adapters or None,
        "rlhf.ref_adapter_load": recipe.rlhf.ref_adapter_load,
    }
    return {field: value for field, value in given.items() if value is not None}
