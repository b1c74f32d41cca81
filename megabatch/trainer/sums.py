"""Metrics of a global batch: summed on the device over micro-batches and ranks, read by the host once.

Nothing here waits for the device before `Pending.read`, and no collective spans the world: values are summed over the
data-parallel replicas, then over the ranks that share a model, so every rank gets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.objectives.objective import Mean
from megabatch.trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Ratio:
    """A metric of the global batch: its numerator and its count."""

    total: float
    count: float

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of a step, before its update."""

    metrics: Mapping[str, Ratio]
    """Of the global batch, the same on every rank."""
    grad_norm: float | None
    """None when fp16 gradients overflowed: there is no update to apply."""
    micro_batches: Sequence[Mapping[str, Mean]]
    """What each of this rank's micro-batches adds to the metrics; empty on ranks that add nothing."""


class Flags(NamedTuple):
    """What ranks decide together after a step: a flag is raised if any rank raises it."""

    stop: bool = False
    """Something asked the run to stop."""
    writing: bool = False
    """A rank is still writing a checkpoint in the background."""


NONE = Flags()
FLAGS = len(NONE)


class Sums:
    """The named metrics of one optimizer step, or of an evaluation."""

    def __init__(self, names: Sequence[str], ranks: Ranks) -> None:
        self._names, self._ranks = tuple(names), ranks
        self._values = torch.zeros(2 * len(names) + FLAGS, dtype=torch.float64, device=ranks.device)
        # one rank of a model adds its values; with context parallelism, each rank adds those of its part of the row
        self.adds = ranks.is_last_stage and ranks.tp_rank == 0

    def add(self, micro_batches: Sequence[Mapping[str, Mean]]) -> None:
        """Adds what the last pipeline stage measured, one mapping per micro-batch; does nothing on other stages."""
        if not (self.adds and micro_batches):
            return
        found = [x for metrics in micro_batches for n in self._names for x in (metrics[n].total, metrics[n].count)]
        self._values[:-FLAGS] += torch.stack(found).double().view(len(micro_batches), -1).sum(0)

    def reduce(self, flags: Flags = NONE) -> Pending:
        """Starts the sum over all ranks; collective."""
        for place, flag in enumerate(flags):
            if flag:
                self._values[place - FLAGS] = 1.0
        for group in (self._ranks.replicas, self._ranks.model):
            if dist.get_world_size(group) > 1:
                dist.all_reduce(self._values, group=group)
        return Pending(self._names, self._values)


class Pending:
    """Sums on their way to the host."""

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names, self._values = names, values
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[dict[str, Ratio], Flags]:
        """The metrics, and the flags that any rank raised; the same on every rank.

        Waits for the device work queued up to `Sums.reduce`, not for anything queued later.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        sums = self._values.tolist()
        flags = Flags(*(count > 0 for count in sums[-FLAGS:]))
        return {name: Ratio(*sums[2 * i : 2 * i + 2]) for i, name in enumerate(self._names)}, flags
