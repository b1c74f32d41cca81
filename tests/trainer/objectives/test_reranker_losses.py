"""Losses and metrics of rerankers, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.objective import Norm
from megabatch.trainer.objectives.reranker import Reranker
from megabatch.trainer.pack import Pack, collate

QUERIES = [([0.5, 2.0, -1.0], [1, 0, 0]), ([1.0, 0.0], [1, 0]), ([0.0, 0.3, 0.2, 0.1], [0, 0, 1, 1])]
"""Scores and whether each document fits."""


def pack() -> Pack:
    samples = [
        Sample(np.arange(2, dtype=np.int32), np.ones(2, np.float32), {"fits": float(one)})
        for _, fits in QUERIES
        for one in fits
    ]
    return collate(samples, items=[item for item, (_, fits) in enumerate(QUERIES) for _ in fits])


def found(temperature: float | None) -> tuple[dict[str, float], Norm, float]:
    scores = torch.tensor([one for some, _ in QUERIES for one in some])[:, None].requires_grad_()
    objective = Reranker(temperature=temperature)
    terms = objective.terms({"scores": scores}, pack())
    metrics = {name: float(mean.total / mean.count) for name, mean in terms.metrics.items()}
    return metrics, objective.norm, float((terms.numerator / terms.weight).detach())


def test_pointwise_is_the_mean_over_documents() -> None:
    metrics, norm, loss = found(None)
    each = [math.log1p(math.exp(-s if y else s)) for some, fits in QUERIES for s, y in zip(some, fits, strict=True)]
    assert norm is Norm.SEQUENCES
    assert loss == metrics["loss"] == pytest.approx(sum(each) / len(each), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_listwise_is_the_mean_over_queries(temperature: float) -> None:
    metrics, norm, loss = found(temperature)
    each = []
    for scores, fits in QUERIES:
        logps = torch.tensor(scores).div(temperature).log_softmax(0).tolist()
        each.append(-sum(p for p, y in zip(logps, fits, strict=True) if y) / sum(fits))
    assert norm is Norm.ITEMS
    assert loss == metrics["loss"] == pytest.approx(sum(each) / len(each), rel=1e-6)


def test_metrics_are_those_of_the_order() -> None:
    metrics, _, _ = found(1.0)
    assert metrics["mrr"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    dcg = [1 / math.log2(3), 1.0, (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))]
    assert metrics["ndcg"] == pytest.approx(sum(dcg) / 3)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_a_micro_batch_without_samples_adds_nothing(temperature: float | None) -> None:
    blank = Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), {"fits": 0.0})
    terms = Reranker(temperature=temperature).terms({"scores": torch.zeros(0, 1)}, collate([], blank=blank))
    assert float(terms.numerator) == float(terms.weight) == 0
    assert all(float(mean.total) == float(mean.count) == 0 for mean in terms.metrics.values())
