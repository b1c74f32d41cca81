"""How many parameters a model of some shape has."""

from __future__ import annotations

from megabatch.plan.shape import ModelShape


def num_parameters(shape: ModelShape) -> int:
    """All weights and biases, tied embeddings counted once."""
    return _outside_layers(shape) + sum(
        _attention(shape) + _mlp(shape, layer, experts=shape.num_experts or 0) for layer in range(shape.num_layers)
    )


def num_active_parameters(shape: ModelShape) -> int:
    """Those that one token meets: of each layer's experts only the chosen ones."""
    return _outside_layers(shape) + sum(
        _attention(shape) + _mlp(shape, layer, experts=shape.moe_router_topk or 0) for layer in range(shape.num_layers)
    )


def _outside_layers(shape: ModelShape) -> int:
    matrices = 2 if shape.untie_embeddings_and_output_weights else 1
    return matrices * shape.vocab_size * shape.hidden_size + shape.hidden_size


def _attention(shape: ModelShape) -> int:
    """Projections, biases and norms of one layer's attention, and the layer's two norms."""
    hidden, head = shape.hidden_size, shape.kv_channels
    heads, qkv = shape.num_attention_heads * head, (shape.num_attention_heads + 2 * shape.num_query_groups) * head
    biases = qkv * shape.add_qkv_bias + hidden * shape.attention_output_bias
    return hidden * qkv + heads * hidden + biases + 2 * head * shape.qk_layernorm + 2 * hidden


def _mlp(shape: ModelShape, layer: int, *, experts: int) -> int:
    """One layer's dense MLP, or its router and that many of its experts."""
    hidden = shape.hidden_size
    if not shape.is_moe_layer(layer):
        width = shape.ffn_hidden_size
        return 3 * hidden * width + (2 * width + hidden) * shape.mlp_bias
    shared = shape.moe_shared_expert_intermediate_size or 0
    width = experts * (shape.moe_ffn_hidden_size or 0) + shared
    return 3 * hidden * width + hidden * (shape.num_experts or 0)
