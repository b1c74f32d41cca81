"""The losses of vectors: by hand, and sentence-transformers' own."""

from __future__ import annotations

import pytest
import torch
from in_sentence_transformers import NEEDS_SENTENCE_TRANSFORMERS, asked
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


@NEEDS_SENTENCE_TRANSFORMERS
def test_losses_are_those_of_sentence_transformers() -> None:
    infonce = InfoNce(temperature=0.05, use_batch=True, fake_negative_margin=None)
    cases = [
        ("CosineSimilarityLoss", pairs(), {}, lambda v, b: cosine_similarity(v, b).mean()),
        ("ContrastiveLoss", pairs(), {"margin": 0.5}, lambda v, b: contrastive(v, b, margin=0.5).mean()),
        ("OnlineContrastiveLoss", pairs(), {"margin": 0.5}, lambda v, b: online_contrastive(v, b, margin=0.5).sum()),
        ("MultipleNegativesRankingLoss", triplets(), {"scale": 20.0}, lambda v, b: infonce.losses(v, b).mean()),
    ]
    answers = asked(*(
        {
            "ask": "loss",
            "name": name,
            "vectors": vectors.tolist(),
            "parts": 3 if NEGATIVE in batch.roles_M else 2,
            "labels": None if NEGATIVE in batch.roles_M else batch.labels_R.tolist(),
            "settings": settings,
        }
        for name, (vectors, batch), settings, _ in cases
    ))  # fmt: skip
    for (name, (vectors, batch), _, ours), (theirs, expected) in zip(cases, answers, strict=True):
        loss = ours(vectors, batch)
        (gradient,) = torch.autograd.grad(loss, vectors)
        assert float(loss.detach()) == pytest.approx(theirs, rel=1e-5), name
        torch.testing.assert_close(gradient, torch.tensor(expected), rtol=1e-5, atol=1e-6, msg=name)


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
