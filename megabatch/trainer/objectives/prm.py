"""Process reward models: whether each step of an answer is right.

T: tokens of the row, or of this rank's part of it. S: segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import cross_entropy

from megabatch.data.tokens.steps import RIGHT
from megabatch.trainer.objectives.objective import Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.token_scores import TokenScores

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


class Prm(Objective):
    """The mean over steps of logsumexp(z) - z_y, for the scores z of wrong (0) and right (1) where a step ends.

    As transformers' `…ForTokenClassification` and TRL's PRMTrainer (arXiv:2211.14275); over the global batch.
    """

    metrics: tuple[str, ...] = ("loss", "accuracy")
    readout: Readout = TokenScores(2)

    def __init__(self, *, last_step_only: bool = False) -> None:
        """Args: last_step_only: the mean over the last steps of all answers."""
        self._last_only = last_step_only
        self.norm = Norm.SEQUENCES if last_step_only else Norm.TOKENS

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        scores_T2, right_T = out["scores"], pack.token_columns[RIGHT].long()
        weights_T = pack.weights_T * _last_steps(pack) if self._last_only else pack.weights_T
        loss = (cross_entropy(scores_T2, right_T, reduction="none") * weights_T).sum()
        hits_T = scores_T2.detach().argmax(1) == right_T
        count = weights_T.sum()
        return Terms(
            per="token",
            numerator=loss,
            weight=count,
            metrics={"loss": Mean(loss.detach(), count), "accuracy": Mean((hits_T * weights_T).sum(), count)},
        )


def _last_steps(pack: Pack) -> Tensor:
    """bool [T]: whether a position is the last before a sequence's closing token, where its last step ends."""
    lengths_S = pack.cu_seqlens.diff()
    return pack.positions_T == lengths_S[pack.segments_T.long()] - 2
