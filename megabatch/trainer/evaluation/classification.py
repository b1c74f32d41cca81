"""What is measured of a whole set of classified samples, and of answers whose steps are judged.

M: samples, or steps. L: labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megabatch.config.training import ProblemType
from megabatch.data.rows.labels import label_columns
from megabatch.data.tokens.steps import RIGHT
from megabatch.trainer.evaluation import measures
from megabatch.trainer.evaluation.whole_set import ITEM, POSITION, Arrays, Measures
from megabatch.trainer.evaluation.yes_or_no import of_part

Pair = tuple[np.ndarray, np.ndarray]
"""What is said of the samples, and what is true of them: [M] each."""


def of_classifier(problem_type: ProblemType, num_labels: int) -> Measures:
    """Measured besides the means over samples, by `problem_type`: of regression, correlations and r2, means over the
    outputs; of single labels, `auc` of one class against the rest, their mean; of several labels, means over these."""
    columns = label_columns(problem_type, num_labels)

    def labels(found: Arrays) -> np.ndarray:
        return np.stack([found[name] for name in columns], axis=1)

    if problem_type == "regression":
        return Measures(["scores"], columns, lambda found: _pairs(found["scores"], labels(found)), _CORRELATIONS)
    if problem_type == "multi_label_classification":
        return Measures(["scores"], columns, lambda found: Tagged(found["scores"], labels(found) > 0.5), _OF_TAGS)
    of = {**_OF_CLASSES, "f1": Classified.f1_macro} if num_labels > 2 else _OF_CLASSES
    return Measures(["scores"], columns, lambda found: Classified.of(found["scores"], labels(found)[:, 0]), of)


def _pairs(said_ML: np.ndarray, true_ML: np.ndarray) -> list[Pair]:
    return list(zip(said_ML.T, true_ML.T, strict=True))


def _mean_over(measure: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Sequence[Pair]], float]:
    return lambda pairs: measures.mean([measure(*pair) for pair in pairs])


_CORRELATIONS = {
    "pearson": _mean_over(measures.pearson),
    "spearman": _mean_over(measures.spearman),
    "r2": _mean_over(measures.r2),
}


@dataclass(frozen=True)
class Classified:
    """Samples of one class each, with what a model says of them."""

    true_M: np.ndarray
    """int."""
    said_M: np.ndarray
    """int: the likeliest class."""
    chances_ML: np.ndarray

    @classmethod
    def of(cls, scores_ML: np.ndarray, labels_M: np.ndarray) -> Classified:
        return cls(labels_M.astype(int), scores_ML.argmax(1), measures.softmax(scores_ML))

    @property
    def classes(self) -> int:
        return int(self.chances_ML.shape[1])

    def f1_macro(self) -> float:
        return measures.mean(measures.f1_by_class(self.said_M, self.true_M, self.classes))

    def auc(self) -> float:
        if self.classes == 2:
            return measures.auc(self.chances_ML[:, 1], self.true_M)
        each = [measures.auc(self.chances_ML[:, c], self.true_M == c) for c in range(self.classes)]
        return measures.mean(each)

    def ece(self) -> float:
        return measures.calibration_error(self.chances_ML.max(1), self.said_M == self.true_M)

    def brier(self) -> float:
        if self.classes == 2:
            return measures.brier(self.chances_ML[:, 1], self.true_M)
        return measures.brier_of_classes(self.chances_ML, self.true_M)


_OF_CLASSES = {
    "f1_macro": Classified.f1_macro,
    "auc": Classified.auc,
    "ece": Classified.ece,
    "brier": Classified.brier,
}


@dataclass(frozen=True)
class Tagged:
    """Samples of several labels each."""

    scores_ML: np.ndarray
    true_ML: np.ndarray
    """bool."""

    def f1_macro(self) -> float:
        return measures.mean(measures.f1_of_labels(self.scores_ML > 0, self.true_ML))

    def auc(self) -> float:
        return _mean_over(measures.auc)(_pairs(self.scores_ML, self.true_ML))

    def brier(self) -> float:
        return measures.brier(measures.sigmoid(self.scores_ML), self.true_ML)


_OF_TAGS = {"f1_macro": Tagged.f1_macro, "auc": Tagged.auc, "brier": Tagged.brier}


def of_steps() -> Measures:
    """Of all steps `f1_macro`, `auc`, and `ece` and `brier` of softmax's probability. Of answers `first_error`: the
    share whose first wrong step is found, or in which rightly none is (arXiv:2412.06559)."""
    of = {**of_part(_OF_CLASSES, lambda found: found.steps), "first_error": Answered.first_error}
    return Measures(["scores"], [RIGHT], Answered.of, of, per="token")


@dataclass(frozen=True)
class Answered:
    """Answers whose steps are wrong (class 0) or right (1)."""

    steps: Classified
    """Those of an answer side by side, in their order."""
    starts: np.ndarray
    """First step of each answer."""

    @classmethod
    def of(cls, found: Arrays) -> Answered:
        order = np.lexsort((found[POSITION], found[ITEM]))
        starts = np.flatnonzero(np.diff(found[ITEM][order], prepend=-1))
        return cls(Classified.of(found["scores"][order], found[RIGHT][order] > 0.5), starts)

    def first_error(self) -> float:
        said, right = (np.split(values == 1, self.starts[1:]) for values in (self.steps.said_M, self.steps.true_M))
        return measures.mean([float(_first_wrong(a) == _first_wrong(b)) for a, b in zip(said, right, strict=True)])


def _first_wrong(right: np.ndarray) -> int:
    """Place of the first wrong step; -1 without one."""
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else -1
