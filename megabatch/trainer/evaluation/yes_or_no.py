"""Measures that several kinds of scores share, and how measures of a part of what is found are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megabatch.trainer.evaluation import measures

Measure = Callable[[Any], float]


def of_part(of: Mapping[str, Measure], part: Callable[[Any], Any]) -> dict[str, Measure]:
    """The measures `of` a part of what is found."""

    def of_its(measure: Measure) -> Measure:
        return lambda found: measure(part(found))

    return {name: of_its(measure) for name, measure in of.items()}


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
