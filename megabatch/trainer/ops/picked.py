"""A few columns of logits whose vocabulary is split across tensor-parallel ranks.

Shapes: T tokens of the flat row, V this rank's columns of the vocabulary, K columns that are picked at each position.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.ops.vocab import VocabShard


def picked_logits(logits_TV: Tensor, ids_TK: Tensor, shard: VocabShard) -> Tensor:
    """The logits of these ids at each position, on every rank; differentiable.

    Args: logits_TV [T, V] any float dtype; ids_TK [T, K] int64, each id at most once at a position, below
    `shard.vocab_size`. Returns: [T, K] fp32.
    """
    return _Picked.apply(logits_TV, ids_TK, shard)


@torch.no_grad()
def top_logits(logits_TV: Tensor, count: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The largest logits of each position over the whole vocabulary, with their ids, in falling order.

    Args: logits_TV [T, V] any float dtype; count: at most `shard.vocab_size`. Returns: fp32 and int64 [T, count].
    """
    mine = min(count, shard.real)
    values_TK = logits_TV.new_full((len(logits_TV), count), float("-inf"), dtype=torch.float32)
    ids_TK = torch.zeros((len(logits_TV), count), dtype=torch.int64, device=logits_TV.device)
    if mine:
        found = logits_TV[:, : shard.real].topk(mine, dim=1)
        values_TK[:, :mine], ids_TK[:, :mine] = found.values.float(), found.indices + shard.start
    if not shard.is_split:
        return values_TK, ids_TK
    values_TK, ids_TK = (_of_all(part, shard) for part in (values_TK, ids_TK))
    best = values_TK.topk(count, dim=1)
    return best.values, ids_TK.gather(1, best.indices)


def _of_all(part_TK: Tensor, shard: VocabShard) -> Tensor:
    """[T, K] of every tensor-parallel rank side by side."""
    parts = [torch.empty_like(part_TK) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, part_TK, group=shard.group)
    return torch.cat(parts, dim=1)


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits_TV: Tensor, ids_TK: Tensor, shard: VocabShard
    ) -> Tensor:
        local_TK = ids_TK - shard.start
        mine_TK = (local_TK >= 0) & (local_TK < shard.real)
        local_TK = local_TK.clamp(0, max(shard.real - 1, 0))
        found_TK = logits_TV.gather(1, local_TK).float().where(mine_TK, 0.0)
        if shard.is_split:
            dist.all_reduce(found_TK, group=shard.group)
        ctx.save_for_backward(local_TK, mine_TK)
        ctx.like = logits_TV.shape, logits_TV.dtype
        return found_TK

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_TK,) = grads
        local_TK, mine_TK = ctx.saved_tensors
        shape, dtype = ctx.like
        out_TV = grad_TK.new_zeros(shape, dtype=dtype)
        # ids of other ranks share a column with one of this rank's: they must add nothing there
        out_TV.scatter_add_(1, local_TK, (grad_TK * mine_TK).to(dtype))
        return out_TV, None, None
