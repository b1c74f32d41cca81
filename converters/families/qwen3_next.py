"""Qwen3-Next: `Qwen3NextForCausalLM`; linear attention (gated delta net) in most layers, a gate in the others.

On disk megatron-core has the parts of a linear attention's input projection and convolution as tensors of their own
(`in_proj.weight.query`, …), and centres every norm on zero. Hugging Face does so too, except for the norm behind the
linear attention: its weight differs by one. Subtracted and added in float32 that is exact for weights of at least 0.5;
smaller ones may lose their last bits in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

from megabatch.converters.families.config_json import (
    Config,
    decoder,
    experts_of,
    layer_types,
    refuse_biases,
    size,
    sparse_layers,
)
from megabatch.converters.families.decoder import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDING,
    OUTPUT,
    TIED,
    moe_mlp,
    moved,
    not_made,
    shared_experts,
)
from megabatch.converters.family import Family
from megabatch.converters.mapping import Experts, GatedQkv, PartOfGroups, Qkv, Rename, Row, Split
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

_OURS, _THEIRS = "decoder.layers.{l}.self_attention.", "model.layers.{l}.linear_attn."
_MIXED = {"query": "linear_keys", "key": "linear_keys", "value": "linear_values"}
_PROJECTED = {**_MIXED, "z": "linear_values"}
_GATES = {"beta": "linear_heads", "alpha": "linear_heads"}


def _parts(ours: str, theirs: str, sizes: dict[str, str], *tail: str, groups: str) -> tuple[Row, ...]:
    """One tensor for each part of a Hugging Face tensor, with the part's name behind."""
    return tuple(
        PartOfGroups(
            f"{_OURS}{ours}.{name}", _THEIRS + theirs, (size, *tail), split="column", layers="linear_attention",
            groups=groups, parts=tuple(sizes.values()), part=part,
        )
        for part, (name, size) in enumerate(sizes.items())
    )  # fmt: skip


def _linear(ours: str, theirs: str, *dims: str, split: Split = "replicated", offset: float = 0.0) -> Rename:
    return Rename(_OURS + ours, theirs, dims, split=split, layers="linear_attention", offset=offset)


_LINEAR_ATTENTION: tuple[Row, ...] = (
    _linear("in_proj.layer_norm_weight", "model.layers.{l}.input_layernorm.weight", "hidden"),
    *_parts("in_proj.weight", "in_proj_qkvz.weight", _PROJECTED, "hidden", groups="linear_groups"),
    *_parts("in_proj.weight", "in_proj_ba.weight", _GATES, "hidden", groups="linear_groups"),
    *_parts("conv1d.weight", "conv1d.weight", _MIXED, "one", "linear_conv", groups="one"),
    _linear("A_log", _THEIRS + "A_log", "linear_heads", split="column"),
    _linear("dt_bias", _THEIRS + "dt_bias", "linear_heads", split="column"),
    _linear("out_norm.weight", _THEIRS + "norm.weight", "linear_value_head", offset=-1.0),
    _linear("out_proj.weight", _THEIRS + "out_proj.weight", "hidden", "linear_values", split="row"),
)


def _gated(row: Row) -> Row:
    if isinstance(row, Qkv):
        return GatedQkv(row.name, row.hf, row.dims, split=row.split, layers="attention", when=row.when)
    return replace(row, layers="attention")


_MLP: tuple[Row | Experts, ...] = (*DENSE_MLP, *moe_mlp(), *shared_experts("mlp.shared_expert"))
_ATTENTION: tuple[Row, ...] = tuple(_gated(row) for row in ATTENTION)

_MTP: tuple[Row | Experts, ...] = (
    Rename("mtp.layers.{m}.enorm.weight", "mtp.pre_fc_norm_embedding.weight", ("hidden",)),
    Rename("mtp.layers.{m}.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", ("hidden",)),
    Rename("mtp.layers.{m}.eh_proj.weight", "mtp.fc.weight", ("hidden", "two_hidden"), split="column"),
    *(moved(row, "mtp.layers.{m}.transformer_layer.", "mtp.layers.{m}.") for row in (*_ATTENTION, *_MLP)),
    Rename("mtp.layers.{m}.final_layernorm.weight", "mtp.norm.weight", ("hidden",)),
)


def _shape(config: Config) -> ModelShape:
    refuse_biases(config, "attention_bias")
    fields = decoder(
        config, model_type="qwen3_next", default_architecture="Qwen3NextForCausalLM", head_dim=256, tensors_only=True
    )
    experts, topk = experts_of(config, "num_experts", "num_local_experts")
    layers = fields["num_layers"]
    groups, heads = size(config, "linear_num_key_heads"), size(config, "linear_num_value_heads")
    if heads % groups:
        raise ConversionError(f"config.json: linear_num_key_heads={groups} must divide linear_num_value_heads={heads}")
    return ModelShape(
        **fields,
        qk_layernorm=True,
        attention_output_gate=True,
        num_experts=experts,
        moe_layers=sparse_layers(config, layers=layers),
        moe_ffn_hidden_size=size(config, "moe_intermediate_size"),
        moe_router_topk=topk,
        moe_shared_expert_intermediate_size=size(config, "shared_expert_intermediate_size"),
        moe_shared_expert_gate=True,
        linear_attention_layers=_linear_layers(config, layers=layers),
        linear_num_key_heads=groups,
        linear_num_value_heads=heads,
        linear_key_head_dim=size(config, "linear_key_head_dim"),
        linear_value_head_dim=size(config, "linear_value_head_dim"),
        linear_conv_kernel_dim=size(config, "linear_conv_kernel_dim"),
        mtp_num_layers=1,  # config.json does not say; `Family.present` takes it back for a folder without
    )


def _linear_layers(config: Config, *, layers: int) -> tuple[bool, ...]:
    """`layer_types`, or else every `full_attention_interval`th layer is not linear."""
    kinds = layer_types(config)
    if kinds is None:
        interval = size(config, "full_attention_interval", default=4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    odd = sorted(set(kinds) - {"linear_attention", "full_attention"})
    if odd or len(kinds) != layers:
        raise ConversionError(
            f"config.json: layer_types has {len(kinds)} entries{', also ' + ', '.join(odd) if odd else ''}; "
            f"linear_attention or full_attention is needed for each of {layers} layers"
        )
    return tuple(kind == "linear_attention" for kind in kinds)


QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM", "Qwen3NextForSequenceClassification", "Qwen3NextForTokenClassification"),
    rows=(*EMBEDDING, *_LINEAR_ATTENTION, *_ATTENTION, *_MLP, *_MTP, *OUTPUT),
    shape=_shape,
    hf_config=not_made,
    tied=TIED,
)
