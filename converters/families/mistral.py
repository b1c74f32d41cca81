"""Mistral, and Ministral of that architecture: `MistralForCausalLM`; Llama's tensors without biases.

Every layer has the sliding window, which counts where it is shorter than the context.
"""

from __future__ import annotations

from typing import Any

from megabatch.converters.families.config_json import Config, decoder, decoder_config, layer_types, size
from megabatch.converters.families.decoder import ATTENTION, DENSE_MLP, EMBEDDING, OUTPUT, ROTARY_BUFFERS, TIED
from megabatch.converters.family import Family
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

_WINDOW = 4096
"""transformers' window for a config.json without `sliding_window`; null means none."""


def sliding_window(config: Config, *, positions: int, default: int | None) -> int | None:
    """The window of every layer, or None where no sequence is longer than it. Args: default: where config.json does
    not name it."""
    if config.get("sliding_window", default) is None:
        return None
    window = size(config, "sliding_window", default=default)
    return window if window < positions else None


def _shape(config: Config) -> ModelShape:
    fields = decoder(config, model_type="mistral", default_architecture="MistralForCausalLM", head_dim=None)
    window = sliding_window(config, positions=fields["max_position_embeddings"], default=_WINDOW)
    if window is not None and layer_types(config) is not None:
        raise ConversionError(
            f"config.json: layer_types beside sliding_window={window} is not supported by this family, whose layers "
            "all have the window; transformers reads such a model as Ministral"
        )
    return ModelShape(**fields | {"sliding_window": window})


def _config(shape: ModelShape, *, dtype: str = "float32", **token_ids: int | None) -> dict[str, Any]:
    return {**decoder_config(shape, dtype=dtype, **token_ids), "sliding_window": shape.sliding_window}


MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM", "MistralForSequenceClassification", "MistralForTokenClassification"),
    rows=(*EMBEDDING, *ATTENTION, *DENSE_MLP, *OUTPUT),
    shape=_shape,
    hf_config=_config,
    tied=TIED,
    ignorable=(ROTARY_BUFFERS,),
)
