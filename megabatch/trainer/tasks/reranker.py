"""Rerankers: a score for how well a document fits a query."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.run import RunConfig
from megabatch.trainer.data.dataset import open_data
from megabatch.trainer.evaluation.ranking import of_reranker
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.reranker import Reranker
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.scores import Scores
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Raises: DataError."""
    return parts_with(Scores(1), run, source, ranks, busy=busy)


def parts_with(
    readout: Readout, run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]
) -> Parts:
    """Args: readout: where a document's score is read. Raises: as above."""
    group = run.recipe.reranker
    listwise = group.loss_type == "listwise_reranker"
    objective = Reranker(readout, temperature=group.listwise_reranker_temperature if listwise else None)
    steps, evaluator = open_data(run, source, ranks, objective, busy=busy)
    measured = with_measures(evaluator, of_reranker(probable=not listwise))
    return Parts(steps=steps, objective=objective, evaluator=measured, export=export_of(run, source))
