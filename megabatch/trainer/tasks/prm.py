"""Process reward models, from answers whose steps are labelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megabatch.config.run import RunConfig
from megabatch.trainer.data.dataset import open_data
from megabatch.trainer.data.stream import open_stream
from megabatch.trainer.evaluation.classification import of_steps
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.prm import Prm
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Answers of a dataset or a stream. Raises: DataError."""
    objective = Prm(last_step_only=run.recipe.prm.train_on_last_step_only)
    opened = open_stream if run.recipe.data.streaming else open_data
    steps, evaluator = opened(run, source, ranks, objective, busy=busy)
    of_all = None if evaluator is None else replace(evaluator, objective=Prm())
    return Parts(
        steps=steps,
        objective=objective,
        evaluator=with_measures(of_all, of_steps()),
        export=export_of(run, source),
    )
