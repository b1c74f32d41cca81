"""Sequence classification and regression: a score head on the last token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.training import ProblemType
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.labels import one_class
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import open_tokens, steps_of
from megabatch.trainer.evaluation.of_task import of_classifier
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.classification import Classification
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Raises: DataError, also if all samples have one class."""
    training = run.recipe.training
    kind: ProblemType = resolved(training.problem_type)
    labels = resolved(training.num_labels)
    objective = Classification(problem_type=kind, num_labels=labels)
    tokens = open_tokens(run, source, ranks, busy=busy)
    if kind == "single_label_classification":
        require_two_classes(tokens.train)
    steps, evaluator = steps_of(run, ranks, tokens, objective)
    measured = with_measures(evaluator, of_classifier(kind, labels))
    return Parts(steps=steps, objective=objective, evaluator=measured, export=export_of(run, source))


def require_two_classes(data: TokenCache) -> None:
    """Raises: DataError if all training samples have one class."""
    classes = np.unique(data.columns["label"])
    if len(classes) == 1:
        raise DataError(f"{data.place(*data.origins[0].tolist())} {one_class(classes[0])}")
