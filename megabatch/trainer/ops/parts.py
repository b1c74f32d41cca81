"""Sums of what several ranks have parts of, inside autograd.

Each rank goes on with the whole sum and returns its own share of a loss, so the gradient of a part is the sum of what
comes back on all of them. A plain all_reduce in the forward would leave the other ranks' shares out of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums over the ranks of a group, on every rank; sums the gradient over them too."""
    return _Summed.apply(part, group)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduced(part, group)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduced(grads[0], ctx.group), None


def _reduced(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole
