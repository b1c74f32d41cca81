"""Normalisation that also runs under sequence parallelism without Transformer Engine or Apex."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv:1910.07467).

    The weight carries megatron-core's `sequence_parallel` mark, so megatron-core sums its gradient over the
    tensor-parallel ranks when each of them sees only part of the tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _CpuRMSNorm(torch.autograd.Function):
    """RMSNorm on CPUs: torch has no kernel there and differentiates its parts, with twice the passes over memory.

    Gradients in n = x / rms: dx = (g w - n mean(g n w)) / rms, dw = sum of g n over all tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, weight_D, inverse)
        return normed * weight_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        normed, weight_D, inverse = ctx.saved_tensors
        product = grad * normed
        mean = (product @ weight_D).div_(normed.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight_D).addcmul_(normed, mean, value=-1).mul_(inverse)
        return grad_x, product.flatten(0, -2).sum(0), None


class LayerNorm(RMSNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias (arXiv:1607.06450)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
