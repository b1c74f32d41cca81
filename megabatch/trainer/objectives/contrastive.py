"""Embeddings: a loss of the vectors of the whole global batch, exact for every split into micro-batches and ranks.

As in gradient caching (arXiv:2101.06983): before the step every text's vector is computed without a graph, and the
loss's gradient with respect to all of them. Each micro-batch then computes its own vectors v again, with a graph, and
goes on with g · v, whose gradient is the loss's own.

N: sequences of a micro-batch. M: those of the global batch. D: dimensions. R: rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.data.tokens.ranked import LABEL, ROLE
from megabatch.trainer.objectives.embedding_losses import Batch, InfoNce, cosines
from megabatch.trainer.objectives.objective import Inference, Mean, Norm, Objective, Terms
from megabatch.trainer.readouts.pooled import Pooled

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

_GRADIENT, _LOSS, _COSINE, _FIRST = "loss_gradient", "row_loss", "row_cosine", "row_first"

Losses = Callable[[Tensor, Batch], Tensor]
"""Vectors [M, D] and what they are → the loss of each row [R]."""


@dataclass(frozen=True, slots=True)
class Matryoshka:
    """The sum of weighted losses of the first dimensions of the vectors, the whole ones among them."""

    of: Losses
    weights: Mapping[int | None, float]
    """Dimensions (None: all) → weight."""

    def __call__(self, vectors_MD: Tensor, batch: Batch) -> Tensor:
        losses = [weight * self.of(vectors_MD[:, :dims], batch) for dims, weight in self.weights.items()]
        return torch.stack(losses).sum(0)


class Contrastive(Objective):
    """The mean over the rows of the global batch of a loss of all its vectors."""

    norm = Norm.ITEMS

    def __init__(self, losses: Losses, readout: Pooled, *, ranking: InfoNce | None) -> None:
        """Args: ranking: measures how often the positive comes first; None for losses of pairs."""
        self._losses, self.readout, self._ranking = losses, readout, ranking
        self.metrics: tuple[str, ...] = ("loss", "cosine", *(("accuracy",) if ranking is not None else ()))

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """Adds the gradient of each vector, and of each row its loss and metrics, at its anchor."""
        found = inference.infer(packs, self.readout)
        vectors_MD, first = inference.everyone(torch.cat([one["vectors"] for one in found]))
        batch = self._batch(packs, inference, vectors_MD.device)
        with torch.enable_grad():
            leaf = vectors_MD.detach().requires_grad_()
            losses_R = self._losses(leaf, batch)
            (gradients_MD,) = torch.autograd.grad(losses_R.sum(), leaf)
        columns = {_GRADIENT: gradients_MD}
        anchors_R = batch.anchors
        for name, values_R in self._measured(vectors_MD, batch, losses_R.detach()).items():
            columns[name] = torch.zeros(len(vectors_MD), device=vectors_MD.device).index_put((anchors_R,), values_R)
        starts = [first]
        for pack in packs:
            starts.append(starts[-1] + pack.sequences)
        return [
            replace(pack, columns={**pack.columns, **{name: values[a:b] for name, values in columns.items()}})
            for pack, a, b in zip(packs, starts, starts[1:], strict=False)
        ]

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        surrogate = (out["vectors"] * pack.columns[_GRADIENT]).sum()
        loss = pack.columns[_LOSS].sum()
        rows = (pack.columns[ROLE] == 0).float().sum() if pack.sequences else loss * 0
        metrics = {"loss": Mean(loss, rows), "cosine": Mean(pack.columns[_COSINE].sum(), rows)}
        if self._ranking is not None:
            metrics["accuracy"] = Mean(pack.columns[_FIRST].sum(), rows)
        numerator = surrogate - surrogate.detach() + loss
        return Terms(per="sequence", numerator=numerator, weight=rows, metrics=metrics)

    def _batch(self, packs: Sequence[Pack], inference: Inference, device: torch.device) -> Batch:
        """What the texts of the global batch are, in the order of their vectors."""
        roles = torch.cat([pack.columns[ROLE].to(device) for pack in packs])
        labels = torch.cat([pack.columns[LABEL].to(device) for pack in packs])
        both, _ = inference.everyone(torch.stack([roles, labels], dim=1))
        is_anchor = both[:, 0] == 0
        return Batch(both[:, 0], is_anchor.long().cumsum(0) - 1, both[is_anchor, 1])

    def _measured(self, vectors_MD: Tensor, batch: Batch, losses_R: Tensor) -> dict[str, Tensor]:
        measured = {_LOSS: losses_R, _COSINE: cosines(vectors_MD, batch)}
        if self._ranking is not None:
            scores_RM = self._ranking.scores(vectors_MD, batch)
            measured[_FIRST] = (scores_RM.argmax(1) == batch.positives).float()
        return measured
