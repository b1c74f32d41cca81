"""What is read from a model's output, before any loss: the contract between the engine and objectives.

A readout runs on the last pipeline stage, once per micro-batch. It knows how the output is split over ranks, so
objectives need not. The same readout serves training, where gradients flow through it, and `Engine.infer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from megabatch.trainer.ops.vocab import VocabShard

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


@dataclass(frozen=True, slots=True)
class Field:
    """Shape and dtype of one field, which the other pipeline stages must know before they receive it."""

    per: Literal["token", "sequence"] = "token"
    """What the first dimension counts: the row's T positions, padding included, or the pack's N sequences. For a row
    split over ranks, a readout returns this rank's tokens but whole sequences (`Pack.sequence_sums`)."""
    shape: tuple[int, ...] = ()
    """The remaining dimensions."""
    dtype: torch.dtype = torch.float32
    """A four-byte type: float32 or int32."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the columns of a model's output are split over ranks; `Pack.cut` describes the split of its rows."""

    vocab: VocabShard
    """The part of the vocabulary that this rank's logits cover."""


class Readout(Protocol):
    """Equal on every rank of the model, up to rounding in collectives. Implementations derive from this class."""

    @property
    def weighted_only(self) -> bool:
        """Whether only positions matter whose `Pack.weights_T` is not 0: the output may then be of these alone."""
        return False

    @property
    def fields(self) -> Mapping[str, Field]:
        """The fields that a call returns, in a fixed order."""
        ...

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        """Args: `output` [T, V]: the model's output for the row, or for its positions `Pack.read_t`; V: this rank's
        columns."""
        ...
