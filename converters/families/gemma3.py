"""Gemma 3, text: `Gemma3ForCausalLM`; norms behind attention and MLP too.

Gemma's norms multiply with one plus their weight. So does megatron-core with `layernorm_zero_centered_gamma`, as
Megatron-Bridge builds this family: the weights stay as they are.
"""

from __future__ import annotations

from megabatch.converters.families.config_json import Config, decoder, refuse_biases, size
from megabatch.converters.families.decoder import ATTENTION, DENSE_MLP, EMBEDDING, OUTPUT, TIED, not_made
from megabatch.converters.family import Family
from megabatch.converters.mapping import Rename, Row
from megabatch.plan.shape import ModelShape

_OURS, _THEIRS = "decoder.layers.{l}.", "model.layers.{l}."
_BEFORE_MLP = _OURS + "mlp.linear_fc1.layer_norm_weight"

_NORMS: tuple[Row, ...] = (
    Rename(_OURS + "self_attention.linear_proj.post_layernorm.weight", _THEIRS + "post_attention_layernorm.weight",
           ("hidden",)),
    Rename(_BEFORE_MLP, _THEIRS + "pre_feedforward_layernorm.weight", ("hidden",)),
    Rename(_OURS + "mlp.linear_fc2.post_layernorm.weight", _THEIRS + "post_feedforward_layernorm.weight",
           ("hidden",)),
)  # fmt: skip
_MLP = tuple(row for row in DENSE_MLP if row.name != _BEFORE_MLP)


def _shape(config: Config) -> ModelShape:
    refuse_biases(config, "attention_bias")
    fields = decoder(
        config,
        model_type="gemma3_text",
        default_architecture="Gemma3ForCausalLM",
        head_dim=256,
        theta=1e6,
        tied=True,
        tensors_only=True,
    )
    return ModelShape(
        **fields | {"sliding_window": size(config, "sliding_window", default=4096)},
        qk_layernorm=True,
        post_layernorms=True,
    )


GEMMA3_TEXT = Family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    rows=(*EMBEDDING, *ATTENTION, *_NORMS, *_MLP, *OUTPUT),
    shape=_shape,
    hf_config=not_made,
    tied=TIED,
)
