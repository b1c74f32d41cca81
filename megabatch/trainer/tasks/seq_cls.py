"""Sequence classification and regression: a score head on the last token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.training import ProblemType
from megabatch.data.cache.token_cache import TokenCache
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import open_tokens, steps_of
from megabatch.trainer.engine import Engine
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.classification import MOST_CLASSES, Classification
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.steps import Evaluator
from megabatch.trainer.sums import Ratio
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
    several = kind == "single_label_classification" and 2 < labels <= MOST_CLASSES
    measured = MeanOverClasses(evaluator) if several and evaluator is not None else evaluator
    return Parts(steps=steps, objective=objective, evaluator=measured, export=export_of(run, source))


def require_two_classes(data: TokenCache) -> None:
    """Raises: DataError if all training samples have one class."""
    classes = np.unique(data.columns["label"])
    if len(classes) == 1:
        raise DataError(
            f"all {len(data):,} training samples have label {int(classes[0])}, the first is "
            f"{data.place(*data.origins[0].tolist())}: a classifier needs at least two classes to tell apart"
        )


@dataclass(frozen=True)
class MeanOverClasses(Evaluator):
    """Adds `f1`, the mean of the classes' own (macro F1)."""

    inner: Evaluator

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        found = self.inner.evaluate(engine, on_batch=on_batch)
        classes = [ratio.value for name, ratio in found.items() if name.startswith("f1_") and ratio.count]
        return {**found, "f1": Ratio(sum(classes), float(len(classes)))}
