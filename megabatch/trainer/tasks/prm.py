"""Process reward models, from answers whose steps are labelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.tokens.steps import RIGHT
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import Validation, open_tokens, steps_of
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.evaluation.of_task import of_steps
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.prm import Prm
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.steps import Steps
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Answers of a dataset or a stream. Raises: DataError, also if all steps of a dataset have one label."""
    objective = Prm(last_step_only=run.recipe.prm.train_on_last_step_only)
    steps: Steps
    evaluator: Validation | None
    if run.recipe.data.streaming:
        steps, evaluator = open_stream(run, source, ranks, objective, busy=busy)
    else:
        tokens = open_tokens(run, source, ranks, busy=busy)
        require_both_labels(tokens.train)
        steps, evaluator = steps_of(run, ranks, tokens, objective)
    if evaluator is not None:
        evaluator = replace(evaluator, objective=Prm())
    return Parts(
        steps=steps,
        objective=objective,
        evaluator=with_measures(evaluator, of_steps()),
        export=export_of(run, source),
    )


def require_both_labels(data: TokenCache) -> None:
    """Raises: DataError if all training steps have one label."""
    labels = np.unique(data.token_columns[RIGHT][np.asarray(data.weights) > 0])
    if len(labels) == 1:
        kind, other = ("right", "wrong") if labels[0] else ("wrong", "right")
        raise DataError(
            f"{data.origin(0)}: all steps are {kind}, here and in all {len(data):,} training samples; the loss tells "
            f"right from wrong ones, so add {other} ones"
        )
