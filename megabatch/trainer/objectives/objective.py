"""What an objective is: numerators of a loss, and the name of the denominator it wants.

Objectives see tensors, never process groups, layouts or the recipe. The engine knows the denominators of the global
batch and divides once; no objective divides by data parallel size, accumulation or context parallel size.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from megabatch.trainer.readouts.readout import Readout

if TYPE_CHECKING:
    from megabatch.trainer.pack import Pack


class Norm(enum.Enum):
    """Denominator of a loss. A loss over a constant takes one of the counts and divides its numerator."""

    TOKENS = "tokens"
    """Sum of the token weights of the global batch."""
    SEQUENCES = "sequences"
    """Sequences of the global batch."""
    ITEMS = "items"
    """Items of the global batch: pairs, groups; each sample is one where nothing groups them."""
    MICRO_BATCH = "micro_batch"
    """Each micro-batch's own weight (`Terms.weight`), then the mean over micro-batches that hold samples."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric that is a ratio of two sums over the global batch."""

    total: Tensor
    """0-d fp32."""
    count: Tensor
    """0-d fp32."""


@dataclass(frozen=True, slots=True)
class Terms:
    """One micro-batch's share of the loss."""

    numerator: Tensor
    """0-d fp32 with gradient."""
    weight: Tensor
    """0-d fp32: this micro-batch's share of the denominator."""
    metrics: Mapping[str, Mean]
    """One for each name in `Objective.metrics`; all are summed over the global batch and logged."""
    per: Literal["token", "sequence"] = "token"
    """What the numbers above are sums over: the tokens of `pack`, of which context-parallel ranks have a part each, or
    its sequences, which they all have (`Pack.sequence_sums`) and which are counted once."""


class Inference(Protocol):
    """What an objective may ask of the engine before a step. Every rank asks for the same, in the same order."""

    def infer(self, packs: Sequence[Pack], readout: Readout, *, model: str = "policy") -> list[dict[str, Tensor]]:
        """The readout's fields of each pack, on every rank that shares the model; no gradients."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that hold other samples of the global batch."""


class Objective(Protocol):
    """A loss. Implementations derive from this class."""

    norm: Norm
    """Denominator of the loss."""
    metrics: tuple[str, ...]
    """Names of the metrics that every micro-batch has, the same on every rank. `loss` is one of them."""
    readout: Readout
    """What `terms` needs of the model's output."""

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """The packs of a step with the columns that the loss needs besides the data's own.

        Runs before the forward, in training and evaluation: the place for log-probabilities of a reference model, for
        a number that depends on the whole global batch, for embeddings of negatives on other ranks.
        """
        return packs

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        """This micro-batch's share of the loss.

        Args: `out`: the fields of `readout`; `pack`: the row, or with context parallelism this rank's part of it.
        """
        ...
