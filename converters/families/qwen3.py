"""Qwen3, dense: `Qwen3ForCausalLM`; norms on each query and key head."""

from __future__ import annotations

from typing import Any

from megabatch.converters.families.config_json import (
    Config,
    decoder,
    decoder_config,
    switch,
    window_config,
    windows_by_layer,
)
from megabatch.converters.families.decoder import ATTENTION, DENSE_MLP, EMBEDDING, OUTPUT, TIED
from megabatch.converters.family import Family
from megabatch.plan.shape import ModelShape

_HEAD_DIM = 128
"""transformers' head dimension for a config.json without `head_dim`."""


def _shape(config: Config) -> ModelShape:
    bias = switch(config, "attention_bias")
    return ModelShape(
        **decoder(config, model_type="qwen3", default_architecture="Qwen3ForCausalLM", head_dim=_HEAD_DIM)
        | windows_by_layer(config),
        add_qkv_bias=bias,
        attention_output_bias=bias,
        qk_layernorm=True,
    )


def _config(shape: ModelShape, *, dtype: str = "float32", **token_ids: int | None) -> dict[str, Any]:
    return {
        **decoder_config(shape, dtype=dtype, **token_ids),
        "attention_bias": shape.attention_output_bias,
        **window_config(shape),
    }


QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "Qwen3ForTokenClassification"),
    rows=(*EMBEDDING, *ATTENTION, *DENSE_MLP, *OUTPUT),
    shape=_shape,
    hf_config=_config,
    tied=TIED,
)
