"""The losses of vectors: by hand, and sentence-transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megabatch.data.tokens.ranked import ANCHOR, NEGATIVE, POSITIVE
from megabatch.trainer.objectives.embedding_losses import (
    Batch,
    InfoNce,
    contrastive,
    cosine_similarity,
    online_contrastive,
)

LABELS = (1.0, 0.0, 1.0, 0.0, 1.0)


def pairs() -> tuple[Tensor, Batch]:
    """Five anchors, each with one text."""
    vectors = torch.randn(10, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    return vectors, Batch(
        torch.tensor([ANCHOR, POSITIVE] * 5), torch.arange(5).repeat_interleave(2), torch.tensor(LABELS)
    )


def triplets() -> tuple[Tensor, Batch]:
    """Four anchors, each with a positive and a negative."""
    vectors = torch.randn(12, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    roles = torch.tensor([ANCHOR, POSITIVE, NEGATIVE] * 4)
    return vectors, Batch(roles, torch.arange(4).repeat_interleave(3), torch.zeros(4))


def of_sentence_transformers(name: str, vectors: Tensor, parts: int, labels: Tensor | None, **settings: Any) -> Tensor:
    """Its loss, given the vectors in place of a model's."""
    losses = pytest.importorskip("sentence_transformers.losses")
    features = [{"sentence_embedding": vectors[part::parts]} for part in range(parts)]
    loss = getattr(losses, name)(model=lambda feature: feature, **settings)
    found: Tensor = loss(features, labels)
    return found


@pytest.mark.parametrize(
    ("name", "ours", "settings", "mean"),
    [
        ("CosineSimilarityLoss", cosine_similarity, {}, True),
        ("ContrastiveLoss", lambda v, b: contrastive(v, b, margin=0.5), {"margin": 0.5}, True),
        ("OnlineContrastiveLoss", lambda v, b: online_contrastive(v, b, margin=0.5), {"margin": 0.5}, False),
    ],
)
def test_losses_of_pairs_are_those_of_sentence_transformers(name: str, ours: Any, settings: Any, mean: bool) -> None:
    vectors, batch = pairs()
    loss = ours(vectors, batch)
    (gradient,) = torch.autograd.grad(loss.mean() if mean else loss.sum(), vectors)
    theirs = of_sentence_transformers(name, vectors, 2, batch.labels_R, **settings)
    (expected,) = torch.autograd.grad(theirs, vectors)
    assert float((loss.mean() if mean else loss.sum()).detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_infonce_is_that_of_sentence_transformers() -> None:
    vectors, batch = triplets()
    loss = InfoNce(temperature=0.05, use_batch=True, fake_negative_margin=None).losses(vectors, batch).mean()
    (gradient,) = torch.autograd.grad(loss, vectors)
    theirs = of_sentence_transformers("MultipleNegativesRankingLoss", vectors, 3, None, scale=20.0)
    (expected,) = torch.autograd.grad(theirs, vectors)
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("use_batch", "margin"), [(True, None), (False, None), (True, 0.1), (True, 0.0)])
def test_infonce_by_hand(use_batch: bool, margin: float | None) -> None:
    vectors, batch = triplets()
    found = InfoNce(temperature=0.2, use_batch=use_batch, fake_negative_margin=margin).losses(vectors, batch)
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).detach()
    for row in range(4):
        anchor, positive = unit[3 * row], unit[3 * row + 1]
        texts = [3 * r + k for r in range(4) for k in (1, 2) if use_batch or r == row]
        cosines = [float(anchor @ unit[text]) for text in texts if text != 3 * row + 1]
        own = float(anchor @ positive)
        kept = [own, *(c for c in cosines if margin is None or c <= own + margin)]
        expected = torch.tensor(kept).div(0.2).logsumexp(0) - own / 0.2
        assert float(found[row].detach()) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_of_one_kind_of_pairs_has_no_hard_ones_of_the_other() -> None:
    vectors, batch = pairs()
    alike = Batch(batch.roles_M, batch.rows_M, torch.ones(5))
    losses = online_contrastive(vectors, alike, margin=0.5)
    assert torch.isfinite(losses).all() and 0 < int((losses > 0).sum()) < 5
