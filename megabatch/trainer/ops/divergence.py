"""Generalised Jensen-Shannon divergence of two distributions over a vocabulary that is split across ranks.

Shapes: T tokens of the flat row, t those of a chunk, V this rank's columns of the (padded) vocabulary, R those of them
that both models have. The teacher's logits exist for one chunk at a time, in the forward pass and again in the
backward pass, so that beside the student's logits and their gradient nothing grows with T times V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.trainer.ops.vocab import VocabShard, row_chunks

Teacher = Callable[[slice], Tensor]
"""Rows → the teacher's logits of this rank's columns: [t, R], any float dtype; the same values at every call."""
CPU_CHUNK_ELEMENTS = 1 << 21
"""Logits of a chunk on a CPU: several rows, since the teacher's whole output layer is read for each chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What is compared, and how."""

    beta: float
    """0: KL(teacher || student), 1: KL(student || teacher); between: as in `objectives.gkd.divergence`."""
    temperature: float
    """Divides the logits of both models."""
    teacher: Teacher
    shard: VocabShard
    """This rank's part; `vocab_size` is that of the ids that both models have, over which both are normalised."""


def divergences(logits_TV: Tensor, targets_T: Tensor | None, how: Compared) -> tuple[Tensor, Tensor]:
    """The divergence of teacher and student at each position, in nats, and log p(target) of the student.

    With q the student's and p the teacher's probabilities at the temperature τ, m = β p + (1 - β) q, and z the
    student's logits (arXiv:2306.13649, equation 1):

        D      = β KL(p || m) + (1 - β) KL(q || m)      dD/dz_v = (1 - β) q_v (log q_v/m_v - KL(q || m)) / τ
        β = 0:   KL(p || q)                             dD/dz_v = (q_v - p_v) / τ
        β = 1:   KL(q || p)                             dD/dz_v = q_v (log q_v/p_v - KL(q || p)) / τ

    log p(target) is at temperature 1. One function has both, because each of two would make a gradient [T, V].

    Args: logits_TV [T, V] any float dtype; targets_T [T] int64 below `shard.vocab_size`, None for no second result.
    Returns: two of [T], fp32, the second 0 without targets; gradients flow to the student's logits.
    """
    return _Divergences.apply(logits_TV, targets_T, how)


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits_TV: Tensor, targets_T: Tensor | None, how: Compared
    ) -> tuple[Tensor, Tensor]:
        # logsumexp of student, teacher, student at temperature 1; then the sums over the vocabulary
        normal_3T = logits_TV.new_empty((3, len(logits_TV)), dtype=torch.float32)
        sums_3T = torch.zeros_like(normal_3T)
        local_T, mine_T = (None, None) if targets_T is None else _own(targets_T, how.shard)
        for rows in row_chunks(logits_TV, on_cpu=CPU_CHUNK_ELEMENTS):
            student_tR, teacher_tR = _chunk(logits_TV, rows, how)
            normal_3T[:, rows] = _normalisers(student_tR, teacher_tR, how)
            if local_T is not None and mine_T is not None and how.shard.real:
                sums_3T[2, rows] = student_tR.gather(1, local_T[rows, None])[:, 0].where(mine_T[rows], 0.0)
            _to_logps(student_tR, teacher_tR, normal_3T[:, rows], how)
            sums_3T[0, rows], sums_3T[1, rows] = _parts(student_tR, teacher_tR, how.beta)
        if how.shard.is_split:
            dist.all_reduce(sums_3T, group=how.shard.group)
        ctx.save_for_backward(logits_TV, local_T, mine_T, normal_3T, sums_3T[1])
        ctx.how = how
        logps_T = sums_3T[2] - normal_3T[2] if targets_T is not None else torch.zeros_like(sums_3T[2])
        return sums_3T[0], logps_T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, local_T, mine_T, normal_3T, mean_T = ctx.saved_tensors
        how: Compared = ctx.how
        apart_T, logps_T = grads
        out_TV = torch.empty_like(logits_TV)
        out_TV[:, how.shard.real :] = 0.0
        for rows in row_chunks(logits_TV, on_cpu=CPU_CHUNK_ELEMENTS) if how.shard.real else ():
            student_tR, teacher_tR = _chunk(logits_TV, rows, how)
            plain_tR = (student_tR - normal_3T[2, rows, None]).exp_() if local_T is not None else None
            _to_logps(student_tR, teacher_tR, normal_3T[:, rows], how)
            grad_tR = _gradient(student_tR, teacher_tR, mean_T[rows, None], how.beta)
            grad_tR.mul_((apart_T[rows] / how.temperature)[:, None])
            if plain_tR is not None and local_T is not None and mine_T is not None:
                grad_tR.addcmul_(plain_tR, -logps_T[rows, None].expand_as(plain_tR))
                grad_tR.scatter_add_(1, local_T[rows, None], (logps_T[rows] * mine_T[rows])[:, None])
            out_TV[rows, : how.shard.real] = grad_tR
        return out_TV, None, None


def _own(targets_T: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The column of each target, any valid one where another rank has it, and whether this rank has it."""
    local_T = targets_T - shard.start
    return local_T.clamp(0, max(shard.real - 1, 0)), (local_T >= 0) & (local_T < shard.real)


def _chunk(logits_TV: Tensor, rows: slice, how: Compared) -> tuple[Tensor, Tensor]:
    """fp32 copies of both models' logits in these rows: [t, R]."""
    student_tR = logits_TV[rows, : how.shard.real].to(torch.float32, copy=True)
    return student_tR, how.teacher(rows).to(torch.float32, copy=True)


def _normalisers(student_tR: Tensor, teacher_tR: Tensor, how: Compared) -> Tensor:
    """[3, t]: logsumexp over the whole vocabulary of student / τ, teacher / τ and student."""
    split, scale = how.shard.is_split, 1.0 / how.temperature
    max_2t = student_tR.new_full((2, len(student_tR)), -math.inf)
    if how.shard.real:
        max_2t = torch.stack([part.amax(dim=1) for part in (student_tR, teacher_tR)])
    if split:
        dist.all_reduce(max_2t, op=dist.ReduceOp.MAX, group=how.shard.group)
    max_3t = max_2t[[0, 1, 0]]
    scales = (scale, scale, 1.0)
    parts = zip((student_tR, teacher_tR, student_tR), max_3t, scales, strict=True)
    sums_3t = torch.stack([((part - top[:, None]).mul_(by)).exp_().sum(dim=1) for part, top, by in parts])
    if split:
        dist.all_reduce(sums_3t, group=how.shard.group)
    return sums_3t.log_() + max_3t * max_3t.new_tensor(scales)[:, None]


def _to_logps(student_tR: Tensor, teacher_tR: Tensor, normal_3t: Tensor, how: Compared) -> None:
    """Logits → log-probabilities, in place."""
    for part, normal_t in zip((student_tR, teacher_tR), normal_3t, strict=False):
        part.mul_(1.0 / how.temperature).sub_(normal_t[:, None])


def _mixed(student_tR: Tensor, teacher_tR: Tensor, beta: float) -> Tensor:
    mixed_tR = teacher_tR + math.log(beta)
    return torch.logaddexp(student_tR + math.log1p(-beta), mixed_tR, out=mixed_tR)


def _kl(first_tR: Tensor, second_tR: Tensor) -> Tensor:
    return (first_tR - second_tR).mul_(first_tR.exp()).sum(dim=1)


def _parts(student_tR: Tensor, teacher_tR: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """This rank's share of the divergence, and of the sum that its gradient needs: [t] each."""
    if beta == 0:
        apart_t = _kl(teacher_tR, student_tR)
        return apart_t, torch.zeros_like(apart_t)
    if beta == 1:
        apart_t = _kl(student_tR, teacher_tR)
        return apart_t, apart_t
    mixed_tR = _mixed(student_tR, teacher_tR, beta)
    mean_t = _kl(student_tR, mixed_tR)
    return beta * _kl(teacher_tR, mixed_tR) + (1 - beta) * mean_t, mean_t


def _gradient(student_tR: Tensor, teacher_tR: Tensor, mean_t1: Tensor, beta: float) -> Tensor:
    """By the student's logits / τ: [t, R]."""
    if beta == 0:
        return student_tR.exp_().sub_(teacher_tR.exp_())
    other_tR = teacher_tR if beta == 1 else _mixed(student_tR, teacher_tR, beta)
    inner_tR = (student_tR - other_tR).sub_(mean_t1).mul_(student_tR.exp_())
    return inner_tR if beta == 1 else inner_tR.mul_(1 - beta)
