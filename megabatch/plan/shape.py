"""The shape of a model, in megatron-core's names: what planning, rules, converters and the trainer know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from megabatch.values import dataclass


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
    """Bias on the matrices of each MLP; in a mixture of experts on each expert's and on the router."""
    qk_layernorm: bool = False
    num_experts: int | None = None
    moe_layers: tuple[bool, ...] = ()
    """For each layer whether it is a mixture of experts; empty for a dense model."""
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before top-k, without renormalising (`norm_topk_prob=false`)."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of all shared experts together; None for a model without."""
    moe_shared_expert_gate: bool = False
    """Each token's shared expert output is scaled by the sigmoid of one learned logit."""
    moe_router_enable_expert_bias: bool = False
    """A bias for each expert, float32, that takes part in choosing experts but not in weighing them."""
    multi_latent_attention: bool = False
    """DeepSeek's attention: queries, keys and values go through low-rank latents; the next five fields are its own."""
    q_lora_rank: int | None = None
    """Rank of the queries' latent; None: queries are projected directly."""
    kv_lora_rank: int | None = None
    qk_head_dim: int | None = None
    """Head dimension of queries and keys without position."""
    qk_pos_emb_head_dim: int | None = None
    """Head dimension of the rotated part of queries and keys, which follows the other."""
    v_head_dim: int | None = None
    mtp_num_layers: int | None = None
    """Layers of multi-token prediction behind the decoder; None for none."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself included, in layers with windowed attention; None where every layer sees all
    of them."""
    window_layers: tuple[bool, ...] = ()
    """For each layer whether it has the window; empty where all of them have it, or none."""
    attention_sinks: bool = False
    """A learned logit for each head joins every softmax (megatron-core's `softmax_type="learnable"`)."""
    attention_output_gate: bool = False
    """The attention's output is scaled by the sigmoid of a second query projection."""
    post_layernorms: bool = False
    """Norms behind attention and MLP too, before they join the residual (Gemma)."""
    linear_attention_layers: tuple[bool, ...] = ()
    """For each layer whether its attention is linear (gated delta net); empty for none."""
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int | None = None
    """Tokens that the convolution before a linear attention sees."""
    num_labels: int | None = None
    """Outputs of a sequence classifier or reward model, which has a score head in place of the output layer; 0 for an
    embedding model, which has neither; None for a language model."""
    head_bias: bool = False
    """Whether the score head has a bias, as one that scores each token has in transformers."""
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    """The config.json this shape was read from."""

    def __hash__(self) -> int:
        """Hashes some of the fields, since mappings have no hash; lets us cache counts per shape."""
        return hash((self.model_type, self.num_layers, self.hidden_size, self.vocab_size))

    def is_moe_layer(self, layer: int) -> bool:
        return bool(self.moe_layers) and self.moe_layers[layer]

    @property
    def has_output_layer(self) -> bool:
        """Whether there are weights from hidden states to the vocabulary besides the embedding's."""
        return self.untie_embeddings_and_output_weights and self.num_labels is None

    @property
    def ties_output_layer(self) -> bool:
        """Whether the output layer is the embedding."""
        return not self.untie_embeddings_and_output_weights and self.num_labels is None

    def is_linear_attention_layer(self, layer: int) -> bool:
        return bool(self.linear_attention_layers) and self.linear_attention_layers[layer]
