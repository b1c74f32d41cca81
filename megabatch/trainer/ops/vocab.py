"""Softmax over a vocabulary that is split across tensor-parallel ranks.

Shapes: T tokens of the flat row, V this rank's columns of the (padded) vocabulary.
A plain all_reduce inside the forward would give wrong gradients under tensor parallelism, so the collectives live in
an autograd.Function whose backward is written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Rows are handled in chunks of about this many logits, so that the fp32 temporaries stay small."""
CPU_CHUNK_ELEMENTS = 1 << 18
"""The same on a CPU: 1 MiB, so that one chunk's passes find it in the cache. No row's result depends on its chunk."""


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The ids of the vocabulary that this rank's logits cover."""

    start: int
    """First id of this rank."""
    size: int
    """Columns of this rank, padding included."""
    vocab_size: int
    """Ids at or past this one are padding and take no part in the softmax."""
    group: dist.ProcessGroup | None
    """Ranks that hold the other columns; None or a group of one for the whole vocabulary."""

    @property
    def real(self) -> int:
        """Columns of this rank that are not padding."""
        return max(0, min(self.size, self.vocab_size - self.start))

    @property
    def is_split(self) -> bool:
        return self.group is not None and dist.get_world_size(self.group) > 1


def token_logps(logits_TV: Tensor, targets_T: Tensor, shard: VocabShard, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under the softmax over the whole vocabulary.

    log p_t = z_{t,y_t} - logsumexp_v z_{t,v} with z = logits / temperature; max, sum and target logit are reduced over
    the tensor-parallel group in fp32 and the backward is (one-hot - softmax) / temperature on the local columns.

    Args: logits_TV [T, V] any float dtype; targets_T [T] int64 global ids below `shard.vocab_size`.
    Returns: [T] fp32.
    Source: Megatron-LM (arXiv:1909.08053) section 3.
    """
    return _TokenLogps.apply(logits_TV, targets_T, shard, 1.0 / temperature)


@torch.no_grad()
def token_entropies(logits_TV: Tensor, shard: VocabShard, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the softmax over the whole vocabulary at each position, in nats; without gradient.

    H_t = log sum_v e^{z_v} - sum_v z_v e^{z_v} / sum_v e^{z_v} with z = logits / temperature, less its largest value.

    Args: logits_TV [T, V] any float dtype. Returns: [T] fp32.
    """
    max_T, sums_2T = _maxima(logits_TV, shard), _empty_fp32(logits_TV, (2,))
    for rows in row_chunks(logits_TV):
        part = torch.sub(logits_TV[rows, : shard.real], max_T[rows, None]).mul_(1.0 / temperature)
        powers = part.exp()
        sums_2T[0, rows], sums_2T[1, rows] = powers.sum(dim=1), part.mul_(powers).sum(dim=1)
    if shard.is_split:
        dist.all_reduce(sums_2T, group=shard.group)
    return sums_2T[0].log() - sums_2T[1] / sums_2T[0]


@torch.no_grad()
def token_collisions(logits_TV: Tensor, shard: VocabShard) -> Tensor:
    """log sum_v p_v^2 of the softmax over the whole vocabulary at each position; without gradient.

    It is log sum_v e^{2 z_v} - 2 log sum_v e^{z_v} with z the logits less their largest: the log-probability that two
    tokens drawn from the softmax are the same.

    Args: logits_TV [T, V] any float dtype. Returns: [T] fp32.
    """
    max_T, sums_2T = _maxima(logits_TV, shard), _empty_fp32(logits_TV, (2,))
    for rows in row_chunks(logits_TV):
        powers = torch.sub(logits_TV[rows, : shard.real], max_T[rows, None]).exp_()
        sums_2T[0, rows], sums_2T[1, rows] = powers.sum(dim=1), powers.square_().sum(dim=1)
    if shard.is_split:
        dist.all_reduce(sums_2T, group=shard.group)
    return sums_2T[1].log() - 2 * sums_2T[0].log()


def _maxima(logits_TV: Tensor, shard: VocabShard) -> Tensor:
    """[T] fp32: the largest logit of each position, over the whole vocabulary."""
    max_T = _empty_fp32(logits_TV, ())
    for rows in row_chunks(logits_TV):
        max_T[rows] = logits_TV[rows, : shard.real].amax(dim=1) if shard.real else float("-inf")
    if shard.is_split:
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=shard.group)
    return max_T


def row_chunks(logits_TV: Tensor, *, on_cpu: int | None = None) -> list[slice]:
    """Slices of rows that together are all of them. Args: on_cpu: logits of a chunk on a CPU, if not as above."""
    elements = CHUNK_ELEMENTS if logits_TV.is_cuda else min(CHUNK_ELEMENTS, on_cpu or CPU_CHUNK_ELEMENTS)
    step = max(1, elements // max(1, logits_TV.shape[1]))
    return [slice(start, start + step) for start in range(0, logits_TV.shape[0], step)]


def _empty_fp32(logits_TV: Tensor, leading: tuple[int, ...]) -> Tensor:
    return logits_TV.new_empty((*leading, logits_TV.shape[0]), dtype=torch.float32)


def _index(local_T: Tensor, real: int) -> Tensor:
    """[T, 1]: column of each target; any valid one where another rank holds it."""
    return local_T.clamp(0, real - 1)[:, None]


def _picked(part_TV: Tensor, local_T: Tensor) -> Tensor:
    return part_TV.gather(1, _index(local_T, part_TV.shape[1]))[:, 0]


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits_TV: Tensor, targets_T: Tensor, shard: VocabShard, scale: float
    ) -> Tensor:
        max_T, sums_2T = _maxima(logits_TV, shard), _empty_fp32(logits_TV, (2,))
        local_T = targets_T - shard.start
        mine_T = (local_T >= 0) & (local_T < shard.real)
        # a CPU takes long for exponentials: its backward gets these in place of the logits
        keeps = ctx.needs_input_grad[0] and logits_TV.device.type == "cpu"
        powers_TV = logits_TV.new_empty((len(logits_TV), shard.real), dtype=torch.float32) if keeps else None
        for rows in row_chunks(logits_TV):
            out = None if powers_TV is None else powers_TV[rows]
            # fp32, with no copy of the rows before
            part = torch.sub(logits_TV[rows, : shard.real], max_T[rows, None], out=out)
            part = part if scale == 1.0 else part.mul_(scale)
            sums_2T[1, rows] = _picked(part, local_T[rows]).where(mine_T[rows], 0.0) if shard.real else 0.0
            sums_2T[0, rows] = part.exp_().sum(dim=1)
        if shard.is_split:
            dist.all_reduce(sums_2T, group=shard.group)
        log_sum_T = sums_2T[0].log()
        if powers_TV is None:
            ctx.save_for_backward(logits_TV, local_T, mine_T, max_T * scale + log_sum_T)
        else:
            ctx.save_for_backward(powers_TV, local_T, mine_T, sums_2T[0])
        ctx.real, ctx.scale, ctx.keeps = shard.real, scale, keeps
        ctx.like = logits_TV.shape, logits_TV.dtype
        return sums_2T[1] - log_sum_T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad_T = grads[0] * ctx.scale
        saved_TV, local_T, mine_T, total_T = ctx.saved_tensors
        real: int = ctx.real
        shape, dtype = ctx.like
        out_TV = saved_TV.new_empty(shape, dtype=dtype)
        out_TV[:, real:] = 0.0
        for rows in row_chunks(out_TV) if real else ():
            part, into = saved_TV[rows, :real], out_TV[rows, :real]
            # fp32 gradients are computed where they go, others in a temporary of their chunk
            out = into if into.dtype == torch.float32 else None
            if ctx.keeps:
                grad = torch.mul(part, (-grad_T[rows] / total_T[rows])[:, None], out=out)
            else:
                grad = torch.add(-total_T[rows, None], part, alpha=ctx.scale, out=out)
                grad.exp_().mul_(-grad_T[rows, None])
            grad.scatter_add_(1, _index(local_T[rows], real), (grad_T[rows] * mine_T[rows])[:, None])
            if grad is not into:
                into.copy_(grad)
        return out_TV, None, None, None
