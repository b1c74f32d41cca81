"""Preference optimisation on answers that are labelled good or bad."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megabatch.config.rlhf import Kto as Group
from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.trainer.data.dataset import Validation
from megabatch.trainer.engine import Engine
from megabatch.trainer.evaluation.preferences import of_judged_answers
from megabatch.trainer.evaluation.whole_set import WholeSet
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.kto import Kto, KtoSettings
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.steps import Evaluator
from megabatch.trainer.sums import Ratio
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.precomputed import open_compared
from megabatch.trainer.tasks.reference import following, frozen_of

logger = logging.getLogger(__name__)

_LEAST, _MOST = 1.0, 4 / 3
"""The ratio of the weights of all good and all bad answers that the authors recommend (arXiv:2402.01306)."""

_FLAT = 10.0
"""Distance of a reward from beta · KL at which the loss's slope is 1/5,000 of its largest."""


@dataclass(frozen=True, slots=True)
class _Watched(Evaluator):
    """Warns where all rewards are so far on one side that the loss has no slope to part them by."""

    inner: Evaluator
    beta: float

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        found = self.inner.evaluate(engine, on_batch=on_batch)
        good, bad = found["rewards/chosen"].value, found["rewards/rejected"].value
        if engine.ranks.is_main and is_flat(good, bad, found["kl"].value * self.beta):
            logger.warning(
                "KTO has collapsed: the rewards of held-out answers are %.1f (good) and %.1f (bad), where its loss is "
                "flat and learns nothing more; start again with a lower learning_rate.lr",
                good,
                bad,
            )
        return found


def is_flat(good: float, bad: float, kl: float) -> bool:
    """Whether good and bad answers' rewards are both far above beta · KL, or both far below. NaN: not known."""
    return min(good, bad) > kl + _FLAT or max(good, bad) < kl - _FLAT


def _watched(evaluator: Validation | None, *, beta: float) -> Evaluator | None:
    if evaluator is None:
        return None
    return _Watched(WholeSet(evaluator, of_judged_answers()), beta)


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Labelled answers of a dataset or a stream, and a reference. Raises: MegabatchError."""
    group = run.recipe.kto
    objective = Kto(
        KtoSettings(
            beta=group.beta,
            desirable_weight=group.desirable_weight,
            undesirable_weight=group.undesirable_weight,
            uses_kl=group.uses_kl,
        )
    )
    steps, evaluator = open_compared(
        run,
        source,
        ranks,
        objective,
        busy=busy,
        note=lambda data: None if run.only_evaluates else _note_balance(data, group),
    )
    return Parts(
        steps=steps,
        objective=objective,
        evaluator=_watched(evaluator, beta=group.beta),
        export=export_of(run, source),
        frozen=frozen_of(run, source, ranks),
        following=following(run),
    )


def _note_balance(data: TokenCache, group: Group) -> None:
    """Logs the numbers of good and bad answers; warns if their weights are far from balanced."""
    matched = data.columns["matched"] > 0
    good = int((data.columns["label"][matched] > 0).sum())
    bad = int(matched.sum()) - good
    ratio = group.desirable_weight * good / max(group.undesirable_weight * bad, 1e-20)
    logger.info("%s good and %s bad answers", f"{good:,}", f"{bad:,}")
    if not _LEAST <= ratio <= _MOST:
        logger.warning(
            "desirable_weight * good / (undesirable_weight * bad) is %.3g; KTO's authors recommend 1 to 1.33: set "
            "kto.desirable_weight or kto.undesirable_weight",
            ratio,
        )
