"""Reward models, from pairs of answers."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.run import RunConfig
from megabatch.trainer.data.dataset import open_data
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.evaluation.preferences import of_rewards
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.rm import Rm
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Pairs of a dataset or a stream. Raises: DataError."""
    objective = Rm(center_rewards_coefficient=run.recipe.rm.center_rewards_coefficient)
    opened = open_stream if run.recipe.data.streaming else open_data
    steps, evaluator = opened(run, source, ranks, objective, busy=busy)
    return Parts(
        steps=steps,
        objective=objective,
        evaluator=with_measures(evaluator, of_rewards()),
        export=export_of(run, source),
    )
