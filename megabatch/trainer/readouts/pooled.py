"""One vector for each sequence, from its hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from megabatch.trainer.readouts.readout import Field, Readout, Split
from megabatch.trainer.readouts.scores import ends

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack

Pooling = Literal["last", "mean", "cls"]


@dataclass(frozen=True, slots=True)
class Pooled(Readout):
    """`vectors` [N, H] fp32: the hidden state of the last or first token, or the mean over a sequence's own tokens."""

    pooling: Pooling
    hidden_size: int
    """H."""

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"vectors": Field("sequence", (self.hidden_size,))}

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        """Args: `output` [T, H]."""
        return {"vectors": pack.sequence_sums(output.float() * self._shares(pack)[:, None])}

    def _shares(self, pack: Pack) -> Tensor:
        """[T] fp32: the weight of each token in its sequence's vector."""
        if self.pooling == "last":
            return ends(pack).float()
        assert pack.shared_N is None, "a vector is of all tokens of its sequence"
        lengths_S, segments_T = pack.cu_seqlens.diff(), pack.segments_T.long()
        own_T = (pack.positions_T < lengths_S[segments_T]) & (segments_T < pack.sequences)
        if self.pooling == "cls":
            return (own_T & (pack.positions_T == 0)).float()
        return own_T / lengths_S[segments_T].clamp(min=1)
