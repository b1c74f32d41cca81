"""The scores of a head at each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class TokenScores(Readout):
    """`scores` [T, L] fp32: what the head says at each position, as transformers' `…ForTokenClassification`."""

    labels: int
    """L."""

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"scores": Field("token", (self.labels,))}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        """Args: `output` [T, L]."""
        return {"scores": output.float()}
