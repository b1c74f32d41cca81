"""The shape of a model, in megatron-core's names: what planning, rules, converters and the trainer know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder-only transformer, read from a Hugging Face `config.json` by its family (`converters.families`)."""

    architecture: str
    """Hugging Face class name, for example `Qwen3MoeForCausalLM`."""
    model_type: str
    """Hugging Face model type and our family's name, for example `qwen3_moe`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of a dense MLP; for a model without dense layers, as config.json has it."""
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Head dimension."""
    vocab_size: int
    """Rows of the embedding on disk, before any padding for tensor parallelism."""
    max_position_embeddings: int
    untie_embeddings_and_output_weights: bool
    norm_epsilon: float
    rotary_base: float
    rope_scaling: Mapping[str, Any] | None = None
    """Hugging Face rope parameters besides theta, with `rope_type`; None for plain rope."""
    add_qkv_bias: bool = False
    attention_output_bias: bool = False
    """Bias on the attention's output projection (Llama's `attention_bias`)."""
    mlp_bias: bool = False
    qk_layernorm: bool = False
    num_experts: int | None = None
    moe_layers: tuple[bool, ...] = ()
    """For each layer whether it is a mixture of experts; empty for a dense model."""
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before top-k, without renormalising (`norm_topk_prob=false`)."""
    moe_shared_expert_intermediate_size: int | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    """The config.json this shape was read from."""

    def is_moe_layer(self, layer: int) -> bool:
        return bool(self.moe_layers) and self.moe_layers[layer]
