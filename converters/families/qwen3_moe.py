"""Qwen3 mixture of experts: `Qwen3MoeForCausalLM`; single layers may be dense."""

from __future__ import annotations

from typing import Any

from megabatch.converters.families.config_json import (
    Config,
    decoder,
    decoder_config,
    experts_of,
    size,
    sparse_layers,
    switch,
    switched_window,
    window_config,
)
from megabatch.converters.families.decoder import ATTENTION, DENSE_MLP, EMBEDDING, OUTPUT, TIED, moe_mlp
from megabatch.converters.family import Family
from megabatch.plan.shape import ModelShape


def _shape(config: Config) -> ModelShape:
    fields = decoder(config, model_type="qwen3_moe", default_architecture="Qwen3MoeForCausalLM", head_dim=None)
    bias = switch(config, "attention_bias")
    experts, topk = experts_of(config, "num_experts", "num_local_experts")
    return ModelShape(
        **fields | {"sliding_window": switched_window(config)},
        add_qkv_bias=bias,
        attention_output_bias=bias,
        qk_layernorm=True,
        num_experts=experts,
        moe_layers=sparse_layers(config, layers=fields["num_layers"]),
        moe_ffn_hidden_size=size(config, "moe_intermediate_size"),
        moe_router_topk=topk,
        moe_router_pre_softmax=not switch(config, "norm_topk_prob"),
    )


def _config(shape: ModelShape, *, dtype: str = "float32", **token_ids: int | None) -> dict[str, Any]:
    return {
        **decoder_config(shape, dtype=dtype, **token_ids),
        "attention_bias": shape.attention_output_bias,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.moe_router_topk,
        "moe_intermediate_size": shape.moe_ffn_hidden_size,
        "norm_topk_prob": not shape.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(shape.num_layers) if not shape.is_moe_layer(layer)],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        **window_config(shape),
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification", "Qwen3MoeForTokenClassification"),
    rows=(*EMBEDDING, *ATTENTION, *DENSE_MLP, *moe_mlp(), *OUTPUT),
    shape=_shape,
    hf_config=_config,
    tied=TIED,
)
