"""DeepSeek-V2, V3 and R1, and models of that architecture (Moonlight, Kimi-K2): multi-latent attention.

Names and layouts are those that megatron-core writes with Transformer Engine: norms of the latents inside the
projections after them, no permutation of the rotated dimensions. We convert MTP layers, which V3 numbers after its
decoder layers; transformers does not load them.
"""

from __future__ import annotations

from megabatch.converters.families.config_json import (
    Config,
    count,
    decoder,
    experts_of,
    leading_dense_layers,
    refuse_biases,
    size,
)
from megabatch.converters.families.decoder import (
    DENSE_MLP,
    EMBEDDING,
    EXPERT_BIAS,
    MTP_COPIES,
    OUTPUT,
    ROTARY_BUFFERS,
    TIED,
    moe_mlp,
    mtp,
    not_made,
    shared_experts,
)
from megabatch.converters.family import Family
from megabatch.converters.mapping import Experts, Rename, Row
from megabatch.plan.shape import ModelShape

_OURS, _THEIRS = "decoder.layers.{l}.self_attention.", "model.layers.{l}.self_attn."

LATENT_ATTENTION: tuple[Row, ...] = (
    Rename("decoder.layers.{l}.input_layernorm.weight", "model.layers.{l}.input_layernorm.weight", ("hidden",)),
    Rename(_OURS + "linear_q_proj.weight", _THEIRS + "q_proj.weight", ("latent_queries", "hidden"), split="column",
           when="!q_lora_rank"),
    Rename(_OURS + "linear_q_down_proj.weight", _THEIRS + "q_a_proj.weight", ("q_lora", "hidden"), when="q_lora_rank"),
    Rename(_OURS + "linear_q_up_proj.layer_norm_weight", _THEIRS + "q_a_layernorm.weight", ("q_lora",),
           when="q_lora_rank"),
    Rename(_OURS + "linear_q_up_proj.weight", _THEIRS + "q_b_proj.weight", ("latent_queries", "q_lora"),
           split="column", when="q_lora_rank"),
    Rename(_OURS + "linear_kv_down_proj.weight", _THEIRS + "kv_a_proj_with_mqa.weight", ("kv_lora_rope", "hidden")),
    Rename(_OURS + "linear_kv_up_proj.layer_norm_weight", _THEIRS + "kv_a_layernorm.weight", ("kv_lora",)),
    Rename(_OURS + "linear_kv_up_proj.weight", _THEIRS + "kv_b_proj.weight", ("latent_keys_values", "kv_lora"),
           split="column"),
    Rename(_OURS + "linear_proj.weight", _THEIRS + "o_proj.weight", ("hidden", "latent_values"), split="row"),
)  # fmt: skip

_LAYER: tuple[Row | Experts, ...] = (*LATENT_ATTENTION, *DENSE_MLP, *moe_mlp(), EXPERT_BIAS, *shared_experts())


def _shape(config: Config, *, model_type: str, default_architecture: str, expert_bias: bool) -> ModelShape:
    refuse_biases(config, "attention_bias", "mlp_bias")
    fields = decoder(
        config, model_type=model_type, default_architecture=default_architecture, head_dim=None, tensors_only=True
    )
    experts, topk = experts_of(config, "n_routed_experts", "num_local_experts", "num_experts")
    width, value_head = size(config, "moe_intermediate_size"), size(config, "v_head_dim")
    return ModelShape(
        **fields | {"kv_channels": value_head},
        num_experts=experts,
        moe_layers=leading_dense_layers(config, layers=fields["num_layers"]),
        moe_ffn_hidden_size=width,
        moe_router_topk=topk,
        moe_shared_expert_intermediate_size=count(config, "n_shared_experts") * width or None,
        moe_router_enable_expert_bias=expert_bias,
        multi_latent_attention=True,
        q_lora_rank=count(config, "q_lora_rank") or None,
        kv_lora_rank=size(config, "kv_lora_rank"),
        qk_head_dim=size(config, "qk_nope_head_dim"),
        qk_pos_emb_head_dim=size(config, "qk_rope_head_dim"),
        v_head_dim=value_head,
        mtp_num_layers=count(config, "num_nextn_predict_layers", "num_mtp_layers") or None,
    )


def _v2(config: Config) -> ModelShape:
    return _shape(config, model_type="deepseek_v2", default_architecture="DeepseekV2ForCausalLM", expert_bias=False)


def _v3(config: Config) -> ModelShape:
    bias = config.get("topk_method", "noaux_tc") == "noaux_tc"
    return _shape(config, model_type="deepseek_v3", default_architecture="DeepseekV3ForCausalLM", expert_bias=bias)


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM", "DeepseekV2ForSequenceClassification"),
    rows=(*EMBEDDING, *_LAYER, *OUTPUT),
    shape=_v2,
    hf_config=not_made,
    tied=TIED,
    ignorable=(ROTARY_BUFFERS,),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM", "DeepseekV3ForSequenceClassification", "DeepseekV3ForTokenClassification"),
    rows=(*EMBEDDING, *_LAYER, *mtp(_LAYER), *OUTPUT),
    shape=_v3,
    hf_config=not_made,
    tied=TIED,
    ignorable=(ROTARY_BUFFERS,),
    mtp_copies=MTP_COPIES,
)
