"""Losses of the vectors of a whole global batch, one value for each row.

M: texts of the batch. R: its rows, each with one anchor and one positive. D: dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megabatch.data.tokens.ranked import ANCHOR, POSITIVE


@dataclass(frozen=True, slots=True)
class Batch:
    """The texts of a global batch."""

    roles_M: Tensor
    rows_M: Tensor
    """int64: the row of each text, from 0."""
    labels_R: Tensor

    @property
    def anchors(self) -> Tensor:
        """[R]: the place of each row's anchor."""
        return (self.roles_M == ANCHOR).nonzero()[:, 0]

    @property
    def positives(self) -> Tensor:
        """[R]"""
        return (self.roles_M == POSITIVE).nonzero()[:, 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class InfoNce:
    """-log of the positive's share of a softmax over it and the negatives of cos / temperature (arXiv:1807.03748).

    With `use_batch` the positives and negatives of all other rows are negatives too.
    """

    temperature: float
    use_batch: bool
    fake_negative_margin: float | None
    """Leaves out negatives whose cosine is above the positive's by more than this; None keeps all."""

    def losses(self, vectors_MD: Tensor, batch: Batch) -> Tensor:
        """[R]."""
        scores_RM = self.scores(vectors_MD, batch)
        picked_R = scores_RM.gather(1, batch.positives[:, None])[:, 0]
        return scores_RM.logsumexp(1) - picked_R

    def scores(self, vectors_MD: Tensor, batch: Batch) -> Tensor:
        """[R, M]: cosines over the temperature, -inf where a text is no candidate for a row."""
        unit_MD = normalize(vectors_MD, dim=1)
        cosines_RM = unit_MD[batch.anchors] @ unit_MD.T
        candidates_RM = (batch.roles_M != ANCHOR).expand_as(cosines_RM)
        rows_R1 = batch.rows_M[batch.anchors][:, None]
        if not self.use_batch:
            candidates_RM = candidates_RM & (batch.rows_M == rows_R1)
        if self.fake_negative_margin is not None:
            own_R1 = cosines_RM.gather(1, batch.positives[:, None])
            candidates_RM = candidates_RM & (cosines_RM <= own_R1 + self.fake_negative_margin)
        return (cosines_RM / self.temperature).masked_fill(~candidates_RM, float("-inf"))


def cosines(vectors_MD: Tensor, batch: Batch) -> Tensor:
    """[R]: cosine similarity of each anchor with its positive."""
    unit_MD = normalize(vectors_MD, dim=1)
    return (unit_MD[batch.anchors] * unit_MD[batch.positives]).sum(1)


def cosine_similarity(vectors_MD: Tensor, batch: Batch) -> Tensor:
    """(cos - label)² [R], sentence-transformers' CosineSimilarityLoss."""
    return (cosines(vectors_MD, batch) - batch.labels_R).square()


def contrastive(vectors_MD: Tensor, batch: Batch, *, margin: float) -> Tensor:
    """½ (y d² + (1 - y) max(0, margin - d)²) with d = 1 - cos [R] (Hadsell et al. 2006), as sentence-transformers'
    ContrastiveLoss."""
    distances_R, labels_R = 1 - cosines(vectors_MD, batch), batch.labels_R
    far_R = (margin - distances_R).clamp(min=0)
    return 0.5 * (labels_R * distances_R.square() + (1 - labels_R) * far_R.square())


def online_contrastive(vectors_MD: Tensor, batch: Batch, *, margin: float) -> Tensor:
    """[R]: d² of positives farther than the closest negative, max(0, margin - d)² of negatives closer than the
    farthest positive, 0 for the others: together they are sentence-transformers' OnlineContrastiveLoss.

    With a single negative (positive) in the batch, positives (negatives) are compared with the mean of their own.
    """
    distances_R, alike_R = 1 - cosines(vectors_MD, batch), batch.labels_R > 0.5
    near_R, far_R = distances_R[alike_R], distances_R[~alike_R]
    losses_R = torch.zeros_like(distances_R)
    if len(near_R):
        limit = far_R.min() if len(far_R) > 1 else near_R.mean()
        losses_R = losses_R.masked_scatter(alike_R, torch.where(near_R > limit, near_R.square(), 0.0))
    if len(far_R):
        limit = near_R.max() if len(near_R) > 1 else far_R.mean()
        short_R = (margin - far_R).clamp(min=0).square()
        losses_R = losses_R.masked_scatter(~alike_R, torch.where(far_R < limit, short_R, 0.0))
    return losses_R
