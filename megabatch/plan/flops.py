"""Arithmetic of a training step, and what accelerators can do. Pure numbers, no torch."""

from __future__ import annotations

from megabatch.plan.shape import ModelShape

PEAK_TFLOPS_BF16 = {
    "A100": 312.0,
    "A800": 312.0,
    "H100": 989.4,
    "H800": 989.4,
    "H200": 989.4,
    "H20": 148.0,
    "B200": 2250.0,
    "L40S": 362.05,
}
"""Dense bf16 tensor-core peak of one device in TFLOP/s, from NVIDIA's data sheets (without sparsity)."""


def peak_tflops(device_name: str) -> float | None:
    """Peak of the device with this name as CUDA reports it, or None where it is not known."""
    words = device_name.upper().replace("-", " ").split()
    return next((PEAK_TFLOPS_BF16[word] for word in words if word in PEAK_TFLOPS_BF16), None)


def matmul_parameters(shape: ModelShape) -> int:
    """Weights that each token is multiplied with: attention, MLP or chosen experts, and the output layer."""
    heads = shape.num_attention_heads * shape.kv_channels
    groups = shape.num_query_groups * shape.kv_channels
    attention = shape.hidden_size * (2 * heads + 2 * groups)
    total = 0
    for layer in range(shape.num_layers):
        if shape.is_moe_layer(layer):
            width = (shape.moe_ffn_hidden_size or 0) * (shape.moe_router_topk or 0)
            width += shape.moe_shared_expert_intermediate_size or 0
            mlp = 3 * shape.hidden_size * width + shape.hidden_size * (shape.num_experts or 0)
        else:
            mlp = 3 * shape.hidden_size * shape.ffn_hidden_size
        total += attention + mlp
    return total + shape.hidden_size * shape.vocab_size


def training_flops(shape: ModelShape, *, tokens: int, mean_length: float) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens, recomputation not counted.

    6 per weight and token, and for causal attention 6 * mean_length * heads per token and layer (arXiv:2104.04473,
    appendix, halved for the causal mask).
    Args: mean_length: token-weighted mean length of the sequences that attend to themselves.
    """
    heads = shape.num_attention_heads * shape.kv_channels
    return tokens * (6.0 * matmul_parameters(shape) + 6.0 * shape.num_layers * mean_length * heads)
