"""The parallel layout of a run: how many ranks each dimension has."""

from __future__ import annotations

from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of a layout in which everything divides: world = tp * pp * cp * dp = etp * ep * pp * edp."""

    world_size: int
    tp: int
    """Tensor parallel."""
    pp: int
    """Pipeline parallel."""
    cp: int
    """Context parallel."""
    dp: int
    """Data parallel."""
    vp: int
    """Chunks of layers on each pipeline stage; 1 without interleaving."""
    ep: int
    """Expert parallel."""
    etp: int
    """Expert tensor parallel."""
    edp: int
    """Expert data parallel: ranks holding the same share of the experts."""
    num_microbatches: int
    """Micro-batches of each data parallel rank in an optimizer step (gradient accumulation)."""


def layout(
    *,
    world_size: int,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    vp: int = 1,
    ep: int = 1,
    etp: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 1,
) -> Layout | None:
    """The layout of these sizes, or None where ranks, experts or batches do not divide."""
    dp, ranks_left = divmod(world_size, tp * pp * cp)
    edp, expert_ranks_left = divmod(world_size, etp * ep * pp)
    if ranks_left or expert_ranks_left or not dp or not edp:
        return None
    num_microbatches, samples_left = divmod(global_batch_size, micro_batch_size * dp)
    if samples_left or not num_microbatches:
        return None
    return Layout(
        world_size=world_size,
        tp=tp,
        pp=pp,
        cp=cp,
        dp=dp,
        vp=vp,
        ep=ep,
        etp=etp,
        edp=edp,
        num_microbatches=num_microbatches,
    )
