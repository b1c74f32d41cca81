"""The scores of a head at the last token of each sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megabatch.trainer.readouts.readout import Field, Readout, Split

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class Scores(Readout):
    """`scores` [N, L] fp32: what the head says at the last token of each sequence, as transformers'
    `…ForSequenceClassification` reads it."""

    labels: int
    """L."""

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"scores": Field("sequence", (self.labels,))}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        """Args: `output` [T, L]."""
        return {"scores": pack.sequence_sums(output.float() * ends(pack)[:, None])}


def ends(pack: Pack) -> Tensor:
    """bool [T]: whether a position is the last token of a sequence, without its padding."""
    stops_S = pack.cu_seqlens.diff()
    if pack.shared_N is not None:
        stops_S = torch.cat([stops_S[: pack.sequences] + pack.shared_N, stops_S[pack.sequences :]])
    segments_T = pack.segments_T.long()
    return (pack.positions_T == stops_S[segments_T] - 1) & (segments_T < pack.sequences)
