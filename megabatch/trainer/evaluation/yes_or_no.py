"""Measures that several kinds of scores share, and how measures of a part of what is found are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megabatch.trainer.evaluation import measures

T = TypeVar("T")
S = TypeVar("S")


def of_part(of: Mapping[str, Callable[[T], float]], part: Callable[[S], T]) -> dict[str, Callable[[S], float]]:
    """The measures `of` a part of what is found."""
    return {name: lambda found, measure=measure: measure(part(found)) for name, measure in of.items()}


@dataclass(frozen=True)
class YesOrNo:
    """How probable a yes is of each of some things, and whether it is right."""

    chances: np.ndarray
    true: np.ndarray
    """bool."""

    def ece(self) -> float:
        """Of the likelier answer."""
        surer = np.maximum(self.chances, 1 - self.chances)
        return measures.calibration_error(surer, (self.chances > 0.5) == self.true)

    def brier(self) -> float:
        return measures.brier(self.chances, self.true)


OF_CHANCES = {"ece": YesOrNo.ece, "brier": YesOrNo.brier}
