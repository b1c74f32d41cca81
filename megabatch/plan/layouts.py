"""Enumerates the layouts of a run on a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

MICRO_BATCH_SIZES = (1, 2, 4, 8)
CHUNKS = (1, 2, 4)
"""Numbers of chunks per pipeline stage to try."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Sizes of a layout, and rows of a micro-batch."""

    tp: int
    pp: int
    vp: int
    cp: int
    ep: int
    etp: int
    micro_batch_size: int


def choices(shape: ModelShape, *, world_size: int, global_batch_size: int) -> Iterator[Choice]:
    """Sizes that divide the ranks; the rules check whether they divide the model too.

    Expert tensor parallelism equals tensor parallelism or is 1, and a micro-batch has up to 8 rows.
    """
    sizes = divisors(world_size)
    for pp in sizes:
        stage = world_size // pp
        experts = [ep for ep in divisors(stage) if ep <= (shape.num_experts or 1)]
        for tp in divisors(stage):
            for cp in divisors(stage // tp):
                rows = _rows(global_batch_size, dp=stage // tp // cp)
                for ep in experts:
                    for etp in {1, tp} if shape.num_experts and stage % (ep * tp) == 0 else {1}:
                        for vp in _chunks(shape, pp):
                            for micro in rows:
                                yield Choice(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, etp=etp, micro_batch_size=micro)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _rows(global_batch_size: int, *, dp: int) -> list[int]:
    """Micro-batch sizes that divide; 1 if none does, so that the rule reports it."""
    return [micro for micro in MICRO_BATCH_SIZES if global_batch_size % (micro * dp) == 0] or [1]


def _chunks(shape: ModelShape, pp: int) -> list[int]:
    if pp == 1:
        return [1]
    return [vp for vp in CHUNKS if vp == 1 or shape.num_layers % (pp * vp) == 0]
