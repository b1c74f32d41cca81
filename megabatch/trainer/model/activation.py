"""The gated activation of dense layers on CPUs, where megatron-core's fused kernel does not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension (arXiv:2002.05202); [..., 2F] to [..., F].

    Equal to megatron-core's own, which adds an offset of 0 and joins the two halves' gradients by a copy.
    """
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        gated = silu(gate)
        ctx.save_for_backward(x, gated)
        return gated * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, gated = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grads[0], gated, out=grad_up)
        torch.mul(grads[0], up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_x
