"""Rules for Muon and its parameters."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.declare import parameters
from megabatch.config.recipe import Recipe
from megabatch.config.rules.optimization import peak_lr
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_PREFIX = "muon_"


def muon_is_chosen(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.optimizer.optimizer == "muon":
        return
    for found in parameters(Recipe):
        if not found.name.startswith(_PREFIX):
            continue
        value = getattr(recipe.optimizer, found.name)
        if value != found.default:
            yield Fault(found.dotted, value, "needs optimizer='muon'", try_=(found.default,))


def muon_trains_whole_matrices(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.optimizer.optimizer == "muon" and recipe.tuner.tuner_type == "lora":
        rule = (
            "orthogonalizes the updates of whole matrices, and LoRA trains two factors of each: no published method "
            "says how large an update of orthogonalized factors should be"
        )
        yield Fault("optimizer.optimizer", "muon", rule, try_=("adam",))


def rates_of_muon_fit(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Megatron-core's schedule would raise the rate where its end is above its peak."""
    group, rates = recipe.optimizer, recipe.learning_rate
    peak = group.muon_lr or peak_lr(recipe)
    least = rates.min_lr if group.muon_min_lr is None else group.muon_min_lr
    if group.muon_lr is not None and (low := max(least, rates.lr_warmup_init)) > group.muon_lr:
        rule = f"must be at least {low:g}, where its warmup begins or its decay ends"
        yield Fault("optimizer.muon_lr", group.muon_lr, rule)
    elif group.muon_min_lr is not None and least > peak:
        yield Fault("optimizer.muon_min_lr", least, f"must be at most {peak:g}, the learning rate of Muon's matrices")


RULES = (muon_is_chosen, muon_trains_whole_matrices, rates_of_muon_fit)
