"""Rerankers: documents that fit a query get a higher score than those that do not.

N: documents of a micro-batch, those of a query side by side. I: queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megabatch.data.tokens.candidates import FITS
from megabatch.trainer.objectives.objective import Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.scores import Scores

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

SCORE = Scores(1)
FIRST = 10
"""NDCG counts the first so many documents."""


class Reranker(Objective):
    """Of scores s and labels y, 1 or 0:

    pointwise: the mean over documents of the binary cross-entropy of sigmoid(s) with y.
    listwise: the mean over queries of the cross-entropy of softmax(s / temperature) over the query's documents with
    y / sum(y), as in ListNet.
    Metrics: `mrr`, 1 over the place of the first document that fits, and `ndcg`, with gain 1 for each of the first
    ten that fits. Documents with equal scores share the best of their places.
    """

    metrics: tuple[str, ...] = ("loss", "mrr", "ndcg")

    def __init__(self, readout: Readout = SCORE, *, temperature: float | None) -> None:
        """Args: readout: gives `scores` [N, 1]; temperature: of the listwise loss; None for the pointwise one."""
        self.readout, self._temperature = readout, temperature
        self.norm = Norm.SEQUENCES if temperature is None else Norm.ITEMS

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        scores_N = out["scores"][:, 0]
        fits_N, items_N = pack.columns[FITS].to(scores_N), pack.items_N
        queries = int(items_N[-1]) + 1 if pack.sequences else 0
        if self._temperature is None:
            losses = binary_cross_entropy_with_logits(scores_N, fits_N, reduction="none")
            weight = scores_N.new_tensor(float(pack.sequences))
        else:
            losses = _listwise(scores_N / self._temperature, fits_N, _same(items_N, items_N))
            weight = scores_N.new_tensor(float(queries))
        count = scores_N.new_tensor(float(queries))
        mrr, ndcg = _ranking(scores_N.detach(), fits_N, items_N, queries)
        return Terms(
            per="sequence",
            numerator=losses.sum(),
            weight=weight,
            metrics={
                "loss": Mean(losses.detach().sum(), weight),
                "mrr": Mean(mrr, count),
                "ndcg": Mean(ndcg, count),
            },
        )


def _same(items_N: Tensor, others_M: Tensor) -> Tensor:
    return items_N[:, None] == others_M[None, :]


def _listwise(scores_N: Tensor, fits_N: Tensor, same_NN: Tensor) -> Tensor:
    """Each document's part of its query's loss [N]."""
    totals_N = scores_N.expand(len(scores_N), -1).masked_fill(~same_NN, float("-inf")).logsumexp(1)
    shares_N = fits_N / (same_NN.to(fits_N) @ fits_N).clamp(min=1)
    return shares_N * (totals_N - scores_N)


def _ranking(scores_N: Tensor, fits_N: Tensor, items_N: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Sums over queries of the reciprocal rank and of NDCG."""
    above_NN = _same(items_N, items_N) & (scores_N[None, :] > scores_N[:, None])
    places_N = 1.0 + above_NN.sum(1)
    of_IN = _same(torch.arange(queries, device=items_N.device), items_N)
    reciprocal_IN = (fits_N / places_N).expand(queries, -1).masked_fill(~of_IN, 0.0)
    gains_N = fits_N * (places_N <= FIRST) / torch.log2(places_N + 1)
    fitting_I = (of_IN * fits_N).sum(1)
    gains = (1.0 / math.log2(place + 2) for place in range(FIRST))
    ideal = torch.tensor(list(accumulate(gains)), device=items_N.device)
    best_I = ideal[fitting_I.long().clamp(1, FIRST) - 1]
    first = reciprocal_IN.amax(1).sum() if queries else fits_N.sum() * 0
    return first, ((of_IN * gains_N).sum(1) / best_I).sum()
