"""Supervised fine-tuning and pre-training: weighted negative log-likelihood of the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megabatch.trainer.objectives.objective import Mean, Norm, Terms, TokenOutput

if TYPE_CHECKING:
    from megabatch.trainer.data.pack import Pack


class Sft:
    """- sum_t w_t log p(y_t | y_<t), over the sum of the weights of the global batch or of each micro-batch."""

    metrics: tuple[str, ...] = ("loss",)

    def __init__(self, *, calculate_per_token_loss: bool = True) -> None:
        self.norm = Norm.GLOBAL_TOKENS if calculate_per_token_loss else Norm.MICRO_BATCH

    def terms(self, out: TokenOutput, pack: Pack) -> Terms:
        """Uses `pack.weights_T` [T] fp32, the weight of the prediction made at each position."""
        total = -(out.logps_T * pack.weights_T).sum()
        weight = pack.weights_T.sum()
        return Terms(numerator=total, weight=weight, metrics={"loss": Mean(total.detach(), weight)})
