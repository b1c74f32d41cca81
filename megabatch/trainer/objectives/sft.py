"""Supervised fine-tuning and pre-training: weighted negative log-likelihood of the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.data.tokens.sample import CHANNEL
from megabatch.trainer.objectives.objective import Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.tokens import Tokens

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


class Sft(Objective):
    """- sum_t w_t f_t log p(y_t | y_<t), over the sum of the weights of the global batch or of each micro-batch.

    f_t is 1; with dynamic fine-tuning (arXiv:2508.05629) it is p(y_t | y_<t) without gradient.
    """

    readout: Readout = Tokens(weighted_only=True)

    def __init__(
        self, *, calculate_per_token_loss: bool = True, dynamic: bool = False, channels: Sequence[str] = ()
    ) -> None:
        """Args: `dynamic`: dynamic fine-tuning; `channels`: names that the samples' column `channel` indexes; each
        gets its own metric."""
        self.norm = Norm.TOKENS if calculate_per_token_loss else Norm.MICRO_BATCH
        self._dynamic, self._channels = dynamic, tuple(channels)
        own = tuple(f"loss_{channel}" for channel in channels)
        self.metrics: tuple[str, ...] = ("loss", *(("nll",) if dynamic else ()), *own)

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        """Uses `pack.weights_T` [T] fp32, the weight of the prediction made at each position."""
        logps_T = out["logps"]
        nll_T = -(logps_T * pack.weights_T)
        losses_T = nll_T * logps_T.detach().exp() if self._dynamic else nll_T
        total, weight = losses_T.sum(), pack.weights_T.sum()
        metrics = {"loss": Mean(total.detach(), weight)}
        if self._dynamic:
            metrics["nll"] = Mean(nll_T.detach().sum(), weight)
        return Terms(numerator=total, weight=weight, metrics=metrics | self._by_channel(losses_T.detach(), pack))

    def _by_channel(self, losses_T: Tensor, pack: Pack) -> dict[str, Mean]:
        """The loss of each channel's tokens; the row's padding counts in the first channel with weight 0."""
        if not self._channels:
            return {}
        channels_S = torch.cat([pack.columns[CHANNEL], pack.columns[CHANNEL].new_zeros(1)])
        channels_T = channels_S[pack.segments_T.long()]
        sums_2C = losses_T.new_zeros((2, len(self._channels)))
        sums_2C = sums_2C.index_add(1, channels_T, torch.stack([losses_T, pack.weights_T]))
        return {f"loss_{name}": Mean(sums_2C[0, c], sums_2C[1, c]) for c, name in enumerate(self._channels)}
