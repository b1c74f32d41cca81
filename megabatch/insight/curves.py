"""The final history of a run, from `metrics.jsonl`, and curves of it that are small enough to draw."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Point = tuple[float, float]

MOST_POINTS = 400
"""Most points of a drawn curve: more than a screen of that width can resolve."""


def final_history(metrics: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of training steps and of evaluations, by step; a lost step that was repeated appears once, as last done.

    A line replaces all earlier lines of its step and of later steps, which were lost when it was written.
    """
    train: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    for line in _lines(metrics):
        into = evaluations if line.get("kind") == "eval" else train
        while into and into[-1]["step"] >= line["step"]:
            into.pop()
        into.append(line)
    return train, evaluations


def curve(lines: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) of each line with a finite number of that name."""
    return [
        (float(line["step"]), float(value))
        for line in lines
        if isinstance(value := line.get(name), int | float) and math.isfinite(value)
    ]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the lowest and highest of each interval, so that no spike is lost, and both ends."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2 - 1
    inner, kept = points[1:-1], [points[0]]
    for index in range(stretches):
        part = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        if part:
            low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
            kept += sorted({low, high})
    return [*kept, points[-1]]


def _lines(metrics: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(metrics, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line
    except OSError:
        return
