"""Memory of a rollout engine that shares a GPU with a rank of the trainer, at the three times when both need some."""

from __future__ import annotations

from collections.abc import Mapping

from megabatch.plan.figures import MemoryEstimate
from megabatch.plan.memory import FRAGMENTATION
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Bytes on one GPU."""

    weights: int
    share: int
    """All that it takes while it generates: weights, keys and values, activations."""
    sleeps: bool
    """Whether it frees its memory while the ranks train; else it keeps `share`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What is on a GPU at one time, in bytes."""

    engine: int
    trainer: int
    certain: int
    """The part of the trainer's that is counted and not modelled: weights, gradients, optimizer."""

    @property
    def total(self) -> int:
        return self.engine + self.trainer


def moments(
    engine: Engine, rank: MemoryEstimate, *, offload_model: bool, offload_optimizer: bool, frozen_copies: int = 0
) -> Mapping[str, Moment]:
    """By the time: `training`, `sending` the weights, and `generating`.

    Args: rank: at the peak of a step; frozen_copies: of `Settings`, which are part of the rank's weights and stay.
    """
    model, optimizer = rank.weights + rank.gradients, rank.optimizer
    copies = rank.weights * frozen_copies // (1 + frozen_copies)
    stays = (copies if offload_model else model) + (0 if offload_optimizer else optimizer)
    at_rest = model + optimizer
    idle = rank.framework - int(FRAGMENTATION * (rank.activations + rank.logits + rank.temporary))
    return {
        "training": Moment(engine=0 if engine.sleeps else engine.share, trainer=rank.total, certain=at_rest),
        "sending": Moment(
            engine=engine.weights if engine.sleeps else engine.share,
            trainer=at_rest + idle,
            certain=at_rest,
        ),
        "generating": Moment(engine=engine.share, trainer=stays + idle, certain=stays),
    }
