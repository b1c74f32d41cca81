"""Preference optimisation on pairs of answers: DPO and its variants."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.rlhf import Dpo as Group
from megabatch.config.run import RunConfig
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.dpo import Dpo, Variant
from megabatch.trainer.objectives.preference_losses import Settings
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.precomputed import open_compared
from megabatch.trainer.tasks.reference import following, frozen_of


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Pairs of a dataset or a stream, and a reference unless the loss needs none. Raises: MegabatchError."""
    objective = Dpo(variant_of(run.recipe.dpo))
    steps, evaluator = open_compared(run, source, ranks, objective, busy=busy)
    return Parts(
        steps=steps,
        objective=objective,
        evaluator=evaluator,
        export=export_of(run, source),
        frozen={} if run.recipe.dpo.reference_free else frozen_of(run, source, ranks),
        following=following(run),
    )


def variant_of(group: Group) -> Variant:
    """The losses of a recipe: each name once, `rpo_alpha` as a weight of `sft`."""
    losses: dict[str, float] = {}
    weights = group.loss_weights or [1.0] * len(group.loss_types)
    for name, weight in zip(group.loss_types, weights, strict=True):
        today = "aot_unpaired" if name == "aot_pair" else name
        losses[today] = losses.get(today, 0.0) + weight
    if group.rpo_alpha is not None:
        losses["sft"] = losses.get("sft", 0.0) + group.rpo_alpha
    return Variant(
        losses=losses,
        settings=Settings(beta=group.beta, label_smoothing=group.label_smoothing, discopop_tau=group.discopop_tau),
        divergence=group.f_divergence_type,
        alpha=group.f_alpha_divergence_coef,
        ld_alpha=group.ld_alpha,
        use_weighting=group.use_weighting,
        reference_free=group.reference_free,
    )
