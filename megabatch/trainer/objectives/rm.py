"""Reward models: the chosen answer of a pair gets the higher score.

N: sequences, in pairs with the chosen one first. P: pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

from megabatch.trainer.objectives.objective import Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.scores import Scores

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


class Rm(Objective):
    """The mean over pairs of -log sigmoid(r_chosen - r_rejected - margin) + c · (r_chosen + r_rejected)².

    The first term is Bradley-Terry's with a margin (arXiv:2307.09288, equation 2); the second, with the coefficient c,
    pulls the mean reward towards zero (arXiv:2312.09244). Both as in TRL's RewardTrainer.
    """

    norm = Norm.ITEMS
    metrics: tuple[str, ...] = ("loss", "accuracy", "margin", "mean_reward")
    readout: Readout = Scores(1)

    def __init__(self, *, center_rewards_coefficient: float | None) -> None:
        self._centering = center_rewards_coefficient or 0.0

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        rewards_N = out["scores"][:, 0]
        chosen_P, rejected_P = rewards_N[0::2], rewards_N[1::2]
        gap_P = chosen_P - rejected_P
        losses_P = -logsigmoid(gap_P - pack.columns["margin"][0::2].to(gap_P))
        losses_P = losses_P + self._centering * (chosen_P + rejected_P).square()
        pairs, count = (gap_P.new_tensor(float(len(some))) for some in (gap_P, rewards_N))
        return Terms(
            per="sequence",
            numerator=losses_P.sum(),
            weight=pairs,
            metrics={
                "loss": Mean(losses_P.detach().sum(), pairs),
                "accuracy": Mean((gap_P.detach() > 0).float().sum(), pairs),
                "margin": Mean(gap_P.detach().sum(), pairs),
                "mean_reward": Mean(rewards_N.detach().sum(), count),
            },
        )
