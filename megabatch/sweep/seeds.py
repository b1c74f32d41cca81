"""A metric over the seeds of a sweep: the mean of runs that differ in their seed alone, and how certain it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megabatch.values import dataclass

SEED = "training.seed"
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The mean of a metric over the finished runs of one point, whatever their seed."""

    values: Mapping[str, Any]
    """Dotted name → value, of what is swept besides the seed."""
    runs: int
    mean: float
    half_width: float | None
    """Half the width of the interval that holds the expected value with `CONFIDENCE`; None with one run."""


def means(points: Sequence[tuple[Mapping[str, Any], float]]) -> list[Mean]:
    """One mean for each combination of the other values, in the order in which they come.

    Args: `points` are the swept values and the metric of each finished run.
    """
    groups: dict[str, tuple[Mapping[str, Any], list[float]]] = {}
    for values, metric in points:
        others = {name: value for name, value in values.items() if name != SEED}
        groups.setdefault(repr(sorted(others.items())), (others, []))[1].append(metric)
    return [
        Mean(values=others, runs=len(found), mean=math.fsum(found) / len(found), half_width=half_width(found))
        for others, found in groups.values()
    ]


def half_width(sample: Sequence[float]) -> float | None:
    """t s / √n: half the confidence interval of the mean of n normal values (Student, 1908); None below two values."""
    count = len(sample)
    if count < 2:
        return None
    mean = math.fsum(sample) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in sample) / (count - 1))
    return quantile(count - 1) * deviation / math.sqrt(count)


def quantile(freedom: int) -> float:
    """The t that |T| does not exceed with probability `CONFIDENCE`, T of Student's distribution."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < CONFIDENCE:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) for whole degrees of freedom (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    if freedom == 1:
        return 2 * angle / math.pi
    for power in range(2 + odd, freedom - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
