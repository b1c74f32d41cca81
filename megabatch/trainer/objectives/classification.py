"""Losses of sequence classification, as transformers' `…ForSequenceClassification` defines them.

N: sequences. L: labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from megabatch.config.training import ProblemType
from megabatch.data.rows.labels import label_columns
from megabatch.trainer.objectives.objective import Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.scores import Scores

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

MOST_CLASSES = 64
"""Up to as many classes have a metric each."""


class Classification(Objective):
    """The mean over sequences of a loss of their scores z.

    | problem_type | loss of a sequence | metrics |
    | --- | --- | --- |
    | regression | mean_l (z_l - y_l)² | `mse`, `mae` |
    | single_label_classification | logsumexp(z) - z_y | `accuracy`, `f1` |
    | multi_label_classification | mean_l softplus(z_l) - y_l z_l | `accuracy`, `f1` |

    Accuracy is the share of sequences, or of labels where a sequence may have several. F1 is 2·tp / (2·tp + fp + fn):
    of class 1 out of two, of each class out of more (`f1_<class>`), over all labels where a sequence may have several.
    """

    norm = Norm.SEQUENCES

    def __init__(self, *, problem_type: ProblemType, num_labels: int) -> None:
        self._kind, self._labels = problem_type, num_labels
        self._columns = label_columns(problem_type, num_labels)
        self.readout: Readout = Scores(num_labels)
        self.metrics: tuple[str, ...] = ("loss", *self._names())

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        scores_NL = out["scores"]
        labels_NC = torch.stack([pack.columns[name].to(scores_NL) for name in self._columns], dim=1)
        losses_N = self._losses(scores_NL, labels_NC)
        count = scores_NL.new_tensor(float(pack.sequences))
        with torch.no_grad():
            measured = self._measured(scores_NL.detach(), labels_NC)
        return Terms(
            per="sequence",
            numerator=losses_N.sum(),
            weight=count,
            metrics={"loss": Mean(losses_N.detach().sum(), count), **measured},
        )

    def _losses(self, scores_NL: Tensor, labels_NC: Tensor) -> Tensor:
        if self._kind == "regression":
            return (scores_NL - labels_NC).square().mean(1)
        if self._kind == "single_label_classification":
            return functional.cross_entropy(scores_NL, labels_NC[:, 0].long(), reduction="none")
        return functional.binary_cross_entropy_with_logits(scores_NL, labels_NC, reduction="none").mean(1)

    def _names(self) -> tuple[str, ...]:
        if self._kind == "regression":
            return ("mse", "mae")
        if self._kind == "multi_label_classification" or self._labels == 2:
            return ("accuracy", "f1")
        return ("accuracy", *self._by_class())

    def _by_class(self) -> tuple[str, ...]:
        return tuple(f"f1_{index}" for index in range(self._labels)) if self._labels <= MOST_CLASSES else ()

    def _measured(self, scores_NL: Tensor, labels_NC: Tensor) -> dict[str, Mean]:
        if self._kind == "regression":
            count = scores_NL.new_tensor(float(scores_NL.numel()))
            errors = scores_NL - labels_NC
            return {"mse": Mean(errors.square().sum(), count), "mae": Mean(errors.abs().sum(), count)}
        if self._kind == "multi_label_classification":
            said, true = scores_NL > 0, labels_NC > 0.5
            return {"accuracy": _share(said == true), "f1": _f1(said.flatten(), true.flatten())}
        said, true = scores_NL.argmax(1), labels_NC[:, 0].long()
        measured = {"accuracy": _share(said == true)}
        if self._labels == 2:
            return measured | {"f1": _f1(said == 1, true == 1)}
        by_class = enumerate(self._by_class())
        return measured | {name: _f1(said == index, true == index) for index, name in by_class}


def _share(right: Tensor) -> Mean:
    return Mean(right.float().sum(), right.new_tensor(float(right.numel()), dtype=torch.float32))


def _f1(said: Tensor, true: Tensor) -> Mean:
    """2·tp / (2·tp + fp + fn) = 2·tp / (positives said + positives)."""
    return Mean(2.0 * (said & true).float().sum(), said.float().sum() + true.float().sum())
