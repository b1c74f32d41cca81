"""Qwen2 and Qwen2.5: `Qwen2ForCausalLM`; always a bias on query, key and value."""

from __future__ import annotations

from typing import Any

from megabatch.converters.families.config_json import Config, decoder, decoder_config, window_config, windows_by_layer
from megabatch.converters.families.decoder import ATTENTION, DENSE_MLP, EMBEDDING, OUTPUT, ROTARY_BUFFERS, TIED
from megabatch.converters.family import Family
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape


def _shape(config: Config) -> ModelShape:
    if config.get("head_dim", 0) is None:
        raise ConversionError("config.json: head_dim=null cannot be read by transformers in this family; leave it out")
    return ModelShape(
        **decoder(config, model_type="qwen2", default_architecture="Qwen2ForCausalLM", head_dim=None)
        | windows_by_layer(config),
        add_qkv_bias=True,
    )


def _config(shape: ModelShape, *, dtype: str = "float32", **token_ids: int | None) -> dict[str, Any]:
    return {**decoder_config(shape, dtype=dtype, **token_ids), **window_config(shape)}


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification"),
    rows=(*EMBEDDING, *ATTENTION, *DENSE_MLP, *OUTPUT),
    shape=_shape,
    hf_config=_config,
    tied=TIED,
    ignorable=(ROTARY_BUFFERS,),
)
