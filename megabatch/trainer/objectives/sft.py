"""Supervised fine-tuning and pre-training: weighted negative log-likelihood of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from megabatch.trainer.objectives.objective import Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.tokens import Tokens

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


class Sft(Objective):
    """- sum_t w_t log p(y_t | y_<t), over the sum of the weights of the global batch or of each micro-batch."""

    metrics: tuple[str, ...] = ("loss",)
    readout: Readout = Tokens()

    def __init__(self, *, calculate_per_token_loss: bool = True) -> None:
        self.norm = Norm.TOKENS if calculate_per_token_loss else Norm.MICRO_BATCH

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        """Uses `pack.weights_T` [T] fp32, the weight of the prediction made at each position."""
        total = -(out["logps"] * pack.weights_T).sum()
        weight = pack.weights_T.sum()
        return Terms(numerator=total, weight=weight, metrics={"loss": Mean(total.detach(), weight)})
