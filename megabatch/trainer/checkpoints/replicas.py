"""Which of the ranks that hold the same tensor writes it, balanced by bytes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megabatch.trainer.ranks import Ranks


class Dealer:
    """Deals tensors to the ranks of a group, each to the rank with the least so far; the same on all its ranks."""

    def __init__(self, size: int) -> None:
        self._dealt = [0] * size

    def writer(self, size: int) -> int:
        """The rank in the group that writes the next tensor, of `size` bytes or numbers."""
        rank = self._dealt.index(min(self._dealt))
        self._dealt[rank] += size
        return rank


def group_of(parameter: nn.Parameter, ranks: Ranks) -> dist.ProcessGroup:
    """The ranks that hold the same part of a parameter."""
    if getattr(parameter, "allreduce", True):
        return ranks.state.get_data_parallel_group(with_context_parallel=True)
    return ranks.state.get_expert_data_parallel_group()


def deal(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Spreads the writing of the model's parameters over the data-parallel ranks, in place.

    megatron-core marks the first rank's copy as the one to save, so the other ranks would write nothing.
    """
    dealers: dict[dist.ProcessGroup, Dealer] = {}
    for item in nested_values(state):
        if not isinstance(item, ShardedTensor | ShardedTensorFactory) or not isinstance(item.data, nn.Parameter):
            continue
        group = group_of(item.data, ranks)
        size, mine = dist.get_world_size(group), dist.get_rank(group)
        *outer, copy = item.replica_id
        if copy != mine:  # this field does not number the copies of this tensor
            continue
        writer = dealers.setdefault(group, Dealer(size)).writer(item.data.numel())
        item.replica_id = (*outer, (mine - writer) % size)
    return state
