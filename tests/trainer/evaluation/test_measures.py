"""Measures of a whole set, by hand and against torch and scikit-learn's definitions written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from megabatch.trainer.evaluation import measures
from megabatch.trainer.evaluation.whole_set import as_mean

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=60).round(1)
"""With ties."""
POSITIVE = RNG.random(60) < 0.4


def test_auc_counts_the_pairs_in_order_and_half_of_the_ties() -> None:
    pairs = list(product(SCORES[POSITIVE], SCORES[~POSITIVE]))
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert measures.auc(SCORES, POSITIVE) == pytest.approx(expected)
    assert math.isnan(measures.auc(SCORES, np.zeros(60)))


def test_pair_accuracy_compares_the_answers_to_one_prompt() -> None:
    prompts = RNG.integers(0, 9, 60)
    pairs = [
        SCORES[a] > SCORES[b] for a, b in product(range(60), repeat=2)
        if prompts[a] == prompts[b] and POSITIVE[a] and not POSITIVE[b]
    ]  # fmt: skip
    assert any(SCORES[a] == SCORES[b] for a, b in product(range(60), repeat=2) if prompts[a] == prompts[b] and a != b)
    assert measures.pair_accuracy(SCORES, POSITIVE, prompts) == pytest.approx(np.mean(pairs))
    assert math.isnan(measures.pair_accuracy(SCORES, POSITIVE, np.arange(60)))


def test_average_precision_takes_equal_scores_together() -> None:
    expected, recall = 0.0, 0.0
    for threshold in sorted(set(SCORES.tolist()), reverse=True):
        said = threshold <= SCORES
        new = float((POSITIVE & said).sum() / POSITIVE.sum())
        expected += (new - recall) * float((POSITIVE & said).sum() / said.sum())
        recall = new
    assert measures.average_precision(SCORES, POSITIVE) == pytest.approx(expected)


def test_f1_of_each_class() -> None:
    said, true = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 2])
    found = measures.f1_by_class(said, true, 4)
    assert found[:3].tolist() == pytest.approx([2 / 4, 2 / 3, 4 / 5])
    assert math.isnan(found[3]) and measures.mean(found) == pytest.approx((1 / 2 + 2 / 3 + 4 / 5) / 3)
    labels = np.eye(3, dtype=bool)
    assert measures.f1_of_labels(labels[said], labels[true]).tolist() == pytest.approx(found[:3].tolist())


def test_correlations_are_those_of_numpy() -> None:
    other = SCORES**3 + RNG.normal(size=60)
    assert measures.pearson(SCORES, other) == pytest.approx(np.corrcoef(SCORES, other)[0, 1])
    places = [[sum(values < v) + (sum(values == v) + 1) / 2 for v in values] for values in (SCORES, other)]
    assert measures.ranks(SCORES).tolist() == places[0]
    assert measures.spearman(SCORES, other) == pytest.approx(np.corrcoef(*places)[0, 1])
    assert math.isnan(measures.pearson(np.ones(3), np.arange(3.0)))
    tenths = np.full(3, 0.1)  # their mean is another float
    for measure in (measures.pearson, measures.spearman):
        assert math.isnan(measure(tenths, np.arange(3.0))) and math.isnan(measure(np.arange(3.0), tenths))
    assert math.isnan(measures.r2(np.arange(3.0), tenths))
    assert measures.r2(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5)


def test_calibration_compares_confidence_with_accuracy_in_each_bin() -> None:
    confidence = np.array([0.1, 0.15, 0.95, 1.0, 0.5])
    right = np.array([0, 1, 1, 0, 1])
    expected = (abs(1 - 0.25) + abs(1 - 0.5) + abs(1 - 1.95)) / 5
    assert measures.calibration_error(confidence, right, bins=5) == pytest.approx(expected)


def test_scores_of_probabilities() -> None:
    scores = torch.from_numpy(RNG.normal(size=(7, 3)) * 50)
    chances = measures.softmax(scores.numpy())
    assert chances == pytest.approx(scores.softmax(1).numpy())
    assert measures.sigmoid(scores.numpy()) == pytest.approx(scores.sigmoid().numpy())
    true = np.array([0, 1, 2, 0, 1, 2, 0])
    expected = np.mean([sum((chances[n, c] - (true[n] == c)) ** 2 for c in range(3)) for n in range(7)])
    assert measures.brier_of_classes(chances, true) == pytest.approx(expected)
    assert measures.brier(np.array([0.5, 1.0]), np.array([1, 1])) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (measures.reciprocal_rank, 1 / 2),
        (measures.precision_over_places, (1 / 2 + 2 / 4 + 3 / 7) / 3),
        (lambda places: measures.reciprocal_rank(places, first=1), 0.0),
        (lambda places: measures.recall_at(places, first=5), 2 / 3),
        (
            lambda places: measures.ndcg_at(places, first=5),
            (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / math.log2(4)),
        ),
    ],
)
def test_rankings(measure: Callable[[np.ndarray], float], expected: float) -> None:
    places = measures.places(np.array([5.0, 9.0, 3.0, 0.5, 4.0, 3.0, 1.0]))
    assert places.tolist() == [2, 1, 4, 7, 3, 4, 6]
    assert measure(places[[0, 2, 3]]) == pytest.approx(expected)


def test_a_measure_lies_where_sums_are_added() -> None:
    """A GPU refuses to add values of the host to its own."""
    for value, expected in ((0.25, [0.25, 1.0]), (math.nan, [0.0, 0.0])):
        found = as_mean(value, torch.device("cpu"))
        assert [found.total.item(), found.count.item()] == expected
    assert as_mean(0.5, torch.device("meta")).total.device.type == "meta"
