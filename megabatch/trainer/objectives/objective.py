"""What an objective is: numerators of a loss, and the name of the denominator it wants.

Objectives see tensors, never process groups, layouts or the recipe. The engine reduces denominators over the global
batch and divides once; no objective divides by data parallel size, accumulation or context parallel size.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from megabatch.trainer.data.pack import Pack


class Norm(enum.Enum):
    """Denominator of a loss."""

    GLOBAL_TOKENS = "global_tokens"
    """Sum of the token weights of the global batch."""
    MICRO_BATCH = "micro_batch"
    """Each micro-batch's own token weights, then the mean over micro-batches."""


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


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What the model says of one row."""

    logps_T: Tensor
    """[T] fp32 log-probability of the target at each position."""


class Objective(Protocol):
    norm: Norm
    """Denominator of the loss."""
    metrics: tuple[str, ...]
    """Names of the metrics that every micro-batch has; the same on every rank."""

    def terms(self, out: TokenOutput, pack: Pack) -> Terms: ...
