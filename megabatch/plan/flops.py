"""Floating-point operations of a training step. Pure numbers, no torch."""

from __future__ import annotations

import functools
from collections import Counter

from megabatch.plan import weights
from megabatch.plan.gpus import gpu_named
from megabatch.plan.shape import ModelShape


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of the device with this name as CUDA reports it, or None where it is not known."""
    gpu = gpu_named(device_name)
    return None if gpu is None else gpu.peak_tflops


@functools.lru_cache(maxsize=64)
def matmul_parameters(shape: ModelShape) -> int:
    """Number of weights that multiply each token: attention, MLP or chosen experts, and the output layer.

    Without layers of multi-token prediction, which are not trained unless a recipe asks for them.
    """
    layers = sum(
        count * _multiplied(shape, weights.layer(shape, kind)) for kind, count in Counter(weights.kinds(shape)).items()
    )
    return layers + _multiplied(shape, (weights.output_layer(shape),))


def _multiplied(shape: ModelShape, found: tuple[weights.Weight, ...]) -> int:
    chosen = shape.moe_router_topk or 0
    return sum(weight.elements * (chosen if weight.experts else 1) for weight in found if weight.cols is not None)


def attention_flops(shape: ModelShape, kind: weights.Kind, *, mean_length: float) -> float:
    """Of one token in one layer, forward, besides the projections.

    Causal attention: 2 for each channel of query and value and each of the mean_length / 2 tokens before it, a sliding
    window not counted. Linear attention: each head's state is read twice and written once (arXiv:2412.06464).
    """
    _, linear = kind
    if linear:
        state = (shape.linear_key_head_dim or 0) * (shape.linear_value_head_dim or 0)
        return 6.0 * (shape.linear_num_value_heads or 0) * state
    return mean_length * shape.num_attention_heads * sum(head_channels(shape))


def head_channels(shape: ModelShape) -> tuple[int, int]:
    """Channels of a head's query (or key) and of its value."""
    if not shape.multi_latent_attention:
        return shape.kv_channels, shape.kv_channels
    return (shape.qk_head_dim or 0) + (shape.qk_pos_emb_head_dim or 0), shape.v_head_dim or 0


def training_flops(shape: ModelShape, *, tokens: int, mean_length: float) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens, recomputation not counted.

    6 per weight and token, and for attention three times the forward pass (arXiv:2104.04473, appendix, halved for the
    causal mask).
    Args: mean_length: token-weighted mean length of the sequences that attend to themselves.
    """
    attention = sum(
        count * attention_flops(shape, kind, mean_length=mean_length)
        for kind, count in Counter(weights.kinds(shape)).items()
    )
    return tokens * (6.0 * matmul_parameters(shape) + 3.0 * attention)
