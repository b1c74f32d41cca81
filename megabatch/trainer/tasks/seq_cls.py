"""Sequence classification and regression: a score head on the last token."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.training import ProblemType
from megabatch.trainer.data.dataset import open_data
from megabatch.trainer.evaluation.classification import of_classifier
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.classification import Classification
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Raises: DataError."""
    training = run.recipe.training
    kind: ProblemType = resolved(training.problem_type)
    labels = resolved(training.num_labels)
    objective = Classification(problem_type=kind, num_labels=labels)
    steps, evaluator = open_data(run, source, ranks, objective, busy=busy)
    measured = with_measures(evaluator, of_classifier(kind, labels))
    return Parts(steps=steps, objective=objective, evaluator=measured, export=export_of(run, source))
