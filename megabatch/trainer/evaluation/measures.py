"""Measures of a whole evaluation set, as pure functions of numpy arrays; NaN where a measure is not defined.

N: samples. C: classes. All numbers are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = np.ndarray
NAN = float("nan")


def ranks(values_N: Numbers) -> Numbers:
    """Places in rising order from 1 [N]; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Numbers = last - (counts - 1) / 2
    return means[inverse]


def auc(scores_N: Numbers, positive_N: Numbers) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, a tie counting half (Mann-Whitney)."""
    positive_N = positive_N.astype(bool)
    positives, negatives = int(positive_N.sum()), int((~positive_N).sum())
    if not positives or not negatives:
        return NAN
    above = ranks(scores_N)[positive_N].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def pair_accuracy(scores_N: Numbers, good_N: Numbers, prompts_N: Numbers) -> float:
    """Of a good and a bad answer to one prompt, how often the good one scores higher; a tie counts as wrong."""
    right = pairs = 0
    order = np.argsort(prompts_N, kind="stable")
    for some in np.split(order, np.flatnonzero(np.diff(prompts_N[order])) + 1):
        good, bad = scores_N[some][good_N[some] > 0], np.sort(scores_N[some][good_N[some] <= 0])
        right += int(np.searchsorted(bad, good, side="left").sum())
        pairs += len(good) * len(bad)
    return right / pairs if pairs else NAN


def average_precision(scores_N: Numbers, positive_N: Numbers) -> float:
    """sum over thresholds of precision · (rise in recall); equal scores are one threshold."""
    positives = float(positive_N.sum())
    if not positives:
        return NAN
    order = np.argsort(-scores_N, kind="stable")
    hits = np.cumsum(positive_N[order])
    at = np.append(np.flatnonzero(np.diff(scores_N[order])), len(order) - 1)
    rise = np.diff(hits[at], prepend=0) / positives
    return float((rise * hits[at] / (at + 1)).sum())


def f1_by_class(said_N: Numbers, true_N: Numbers, classes: int) -> Numbers:
    """2·tp / (2·tp + fp + fn) of each class [C]; NaN for one that is neither said nor true."""
    hits = np.bincount(true_N[said_N == true_N], minlength=classes)
    both = np.bincount(said_N, minlength=classes) + np.bincount(true_N, minlength=classes)
    return np.divide(2.0 * hits, both, out=np.full(classes, np.nan), where=both > 0)


def f1_of_labels(said_NC: Numbers, true_NC: Numbers) -> Numbers:
    """The same of each label [C] where a sample may have several."""
    both = (said_NC.sum(0) + true_NC.sum(0)).astype(float)
    return np.divide(2.0 * (said_NC & true_NC).sum(0), both, out=np.full(len(both), np.nan), where=both > 0)


def mean(values: Numbers | Sequence[float]) -> float:
    """Of those that are defined."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else NAN


def pearson(a_N: Numbers, b_N: Numbers) -> float:
    """Linear correlation."""
    if len(a_N) < 2 or _is_constant(a_N) or _is_constant(b_N):
        return NAN
    a, b = a_N - a_N.mean(), b_N - b_N.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else NAN


def spearman(a_N: Numbers, b_N: Numbers) -> float:
    """Correlation of the places."""
    return pearson(ranks(a_N), ranks(b_N))


def r2(said_N: Numbers, true_N: Numbers) -> float:
    """1 - squared errors / variation of the truth."""
    if not len(true_N) or _is_constant(true_N):
        return NAN
    variation = float(np.square(true_N - true_N.mean()).sum())
    return 1 - float(np.square(said_N - true_N).sum()) / variation if variation else NAN


def _is_constant(values_N: Numbers) -> bool:
    """Whether all are equal: their mean is rounded, so that differences from it need not be 0."""
    return bool((values_N == values_N[0]).all())


def calibration_error(confidence_N: Numbers, right_N: Numbers, *, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of their share · |accuracy - mean confidence|.

    Bins are of equal width over (0, 1], closed above (arXiv:1706.04599, equation 3).
    """
    if not len(confidence_N):
        return NAN
    place = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    sure = np.bincount(place, weights=confidence_N, minlength=bins)
    right = np.bincount(place, weights=right_N.astype(float), minlength=bins)
    return float(np.abs(right - sure).sum() / len(confidence_N))


def brier(probabilities_N: Numbers, true_N: Numbers) -> float:
    """Mean squared error of the probability of a yes."""
    return float(np.square(probabilities_N - true_N).mean()) if len(true_N) else NAN


def brier_of_classes(probabilities_NC: Numbers, true_N: Numbers) -> float:
    """Mean over samples of the squared distance from the true class's corner, from 0 to 2 (Brier 1950)."""
    if not len(true_N):
        return NAN
    corners = np.eye(probabilities_NC.shape[1])[true_N]
    return float(np.square(probabilities_NC - corners).sum(1).mean())


def sigmoid(scores: Numbers) -> Numbers:
    return np.where(scores >= 0, 1, np.exp(np.minimum(scores, 0))) / (1 + np.exp(-np.abs(scores)))


def softmax(scores_NC: Numbers) -> Numbers:
    powers: Numbers = np.exp(scores_NC - scores_NC.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def places(scores: Numbers) -> Numbers:
    """Places in falling order from 1; equal scores share the best of their places."""
    ordered = np.sort(scores)
    return np.asarray(len(scores) + 1 - np.searchsorted(ordered, scores, side="right"))


def reciprocal_rank(places_of_fitting: Numbers, *, first: int | None = None) -> float:
    """1 over the place of the first document that fits, 0 beyond `first` places."""
    best = places_of_fitting.min()
    return 0.0 if first is not None and best > first else 1.0 / float(best)


def recall_at(places_of_fitting: Numbers, *, first: int) -> float:
    """Share of the documents that fit which are among the first so many."""
    return float((places_of_fitting <= first).mean())


def ndcg_at(places_of_fitting: Numbers, *, first: int) -> float:
    """Discounted gain over the best possible one: gain 1 for each that fits among the first so many."""
    gained = 1 / np.log2(places_of_fitting[places_of_fitting <= first] + 1)
    return float(gained.sum() / (1 / np.log2(np.arange(min(first, len(places_of_fitting))) + 2)).sum())


def precision_over_places(places_of_fitting: Numbers) -> float:
    """Average precision of one ranking: mean over those that fit of the share that fits down to their place."""
    ordered = np.sort(places_of_fitting)
    return float((np.arange(1, len(ordered) + 1) / ordered).mean())
