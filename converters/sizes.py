"""The sizes of a model that mapping rows refer to by name."""

from __future__ import annotations

from collections.abc import Mapping

from megabatch.plan.shape import ModelShape

Sizes = Mapping[str, int]


def sizes_of(shape: ModelShape) -> Sizes:
    """Every size by name; those that the model does not have are 0."""
    head, heads, groups = shape.kv_channels, shape.num_attention_heads, shape.num_query_groups
    return {
        "one": 1,
        "vocab": shape.vocab_size,
        "labels": shape.num_labels or 0,
        "hidden": shape.hidden_size,
        "two_hidden": 2 * shape.hidden_size,
        "head": head,
        "num_heads": heads,
        "num_groups": groups,
        "heads": heads * head,
        "groups": groups * head,
        "ffn": shape.ffn_hidden_size,
        "experts": shape.num_experts or 0,
        "expert_ffn": shape.moe_ffn_hidden_size or 0,
        "shared_ffn": shape.moe_shared_expert_intermediate_size or 0,
        **_latent(shape),
        **_linear(shape),
    }


def _latent(shape: ModelShape) -> Sizes:
    """Multi-latent attention: `rope` is the part of the latent key that carries the position."""
    heads, rope = shape.num_attention_heads, shape.qk_pos_emb_head_dim or 0
    plain, value = shape.qk_head_dim or 0, shape.v_head_dim or 0
    return {
        "q_lora": shape.q_lora_rank or 0,
        "kv_lora": shape.kv_lora_rank or 0,
        "kv_lora_rope": (shape.kv_lora_rank or 0) + rope,
        "latent_queries": heads * (plain + rope),
        "latent_keys_values": heads * (plain + value),
        "latent_values": heads * value,
    }


def _linear(shape: ModelShape) -> Sizes:
    """Linear attention (gated delta net)."""
    groups, heads = shape.linear_num_key_heads or 0, shape.linear_num_value_heads or 0
    return {
        "linear_groups": groups,
        "linear_heads": heads,
        "linear_value_head": shape.linear_value_head_dim or 0,
        "linear_keys": groups * (shape.linear_key_head_dim or 0),
        "linear_values": heads * (shape.linear_value_head_dim or 0),
        "linear_conv": shape.linear_conv_kernel_dim or 0,
    }
