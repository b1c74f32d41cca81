"""What is read from a model's output, before any loss: the contract between the engine and objectives.

A readout runs on the last pipeline stage, once for each micro-batch. It knows how the output is split over ranks, so
that objectives need not. The same readout serves training, where gradients flow through it, and `Engine.infer`.
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
    """The form of one thing read, which the other pipeline stages need to know before it arrives."""

    per: Literal["token", "sequence"] = "token"
    """What the first dimension counts: the row's T positions, padding included, or the pack's N sequences. Of a row
    that is cut over ranks a readout gives this rank's tokens, and whole sequences (`Pack.sequence_sums`)."""
    shape: tuple[int, ...] = ()
    """The dimensions after it."""
    dtype: torch.dtype = torch.float32
    """A type of four bytes: float32 or int32."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the columns of a model's output are split over ranks; `Pack.cut` says how its rows are."""

    vocab: VocabShard
    """The columns of the vocabulary that this rank's logits are for."""


class Readout(Protocol):
    """Equal on every rank of the model but for rounding of collectives. Implementations derive from this class."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """What a call gives, in a fixed order."""
        ...

    def __call__(self, output: Tensor, pack: Pack, split: Split) -> Mapping[str, Tensor]:
        """Args: `output` [T, V]: what the model gives for the row, V this rank's columns."""
        ...
