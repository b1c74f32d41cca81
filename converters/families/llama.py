"""Llama 2 and 3: `LlamaForCausalLM`."""

from __future__ import annotations

from typing import Any

from megabatch.converters.families.config_json import Config, decoder, decoder_config, refuse_windows, switch
from megabatch.converters.families.decoder import ATTENTION, DENSE_MLP, EMBEDDING, OUTPUT, ROTARY_BUFFERS, TIED
from megabatch.converters.family import Family
from megabatch.plan.shape import ModelShape


def _shape(config: Config) -> ModelShape:
    refuse_windows(config)
    bias = switch(config, "attention_bias")
    return ModelShape(
        **decoder(config, model_type="llama", default_architecture="LlamaForCausalLM", head_dim=None),
        add_qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=switch(config, "mlp_bias"),
    )


def _config(shape: ModelShape, *, dtype: str = "float32", **token_ids: int | None) -> dict[str, Any]:
    return {
        **decoder_config(shape, dtype=dtype, **token_ids),
        "attention_bias": shape.attention_output_bias,
        "mlp_bias": shape.mlp_bias,
    }


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification"),
    rows=(*EMBEDDING, *ATTENTION, *DENSE_MLP, *OUTPUT),
    shape=_shape,
    hf_config=_config,
    tied=TIED,
    ignorable=(ROTARY_BUFFERS,),
)
