"""What an objective is: numerators of a loss, and the name of the denominator it wants.

Objectives see tensors, never process groups, layouts or the recipe. The engine knows the denominators of the global
batch and divides once; an objective never divides by data-parallel size, accumulation steps or context-parallel size.
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
    """Denominator of a loss. A loss divided by a constant picks one of the counts and scales its numerator."""

    TOKENS = "tokens"
    """Sum of the token weights of the global batch."""
    SEQUENCES = "sequences"
    """Sequences of the global batch."""
    ITEMS = "items"
    """Items of the global batch, such as pairs or groups; ungrouped samples are one item each."""
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
    """One for each name in `Objective.metrics`; the engine sums them over the global batch and logs them."""
    per: Literal["token", "sequence"] = "token"
    """What the values above sum over. "token": the tokens of `pack`, which context-parallel ranks split. "sequence":
    its sequences, which all of these ranks have (`Pack.sequence_sums`); the engine counts them once."""


class Inference(Protocol):
    """What an objective may call on the engine before a step. Every rank makes the same calls in the same order."""

    def infer(self, packs: Sequence[Pack], readout: Readout, *, model: str = "policy") -> list[dict[str, Tensor]]:
        """The readout's fields of each pack, on every rank that shares the model; no gradients."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that hold other samples of the global batch, on the model's device."""

    def everyone(self, values: Tensor) -> tuple[Tensor, int]:
        """The rows [n, …] of all of these ranks, one after the other, and the place of this rank's first row."""


REFERENCE = "reference"
"""Name of the frozen model that a policy is compared with, and of the column of its log-probabilities."""


class Compared(Protocol):
    """An objective that compares the policy's log-probabilities of whole sequences with a reference's."""

    def log_probs(self, packs: Sequence[Pack], inference: Inference, *, model: str = "policy") -> list[Tensor]:
        """What a model gives each sequence as the loss counts it: fp32 [N] of each pack.

        `prepare` asks for the reference's, unless the data has them as the column `REFERENCE`.
        """
        ...


class Objective(Protocol):
    """A loss. Implementations derive from this class."""

    norm: Norm
    """Denominator of the loss."""
    metrics: tuple[str, ...]
    """Names of the metrics of every micro-batch, the same on every rank; includes `loss`."""
    readout: Readout
    """What `terms` needs from the model's output."""

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        """Adds to a step's packs the columns that the loss needs and the data does not have.

        Runs before the forward pass, in training and evaluation. Compute here, for example, a reference model's
        log-probabilities, a value that depends on the whole global batch, or embeddings of negatives on other ranks.
        """
        return packs

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        """This micro-batch's share of the loss.

        Args: `out`: the fields of `readout`; `pack`: the row or, with context parallelism, this rank's part of it.
        """
        ...
