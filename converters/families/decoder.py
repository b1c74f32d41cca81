"""Rows shared by decoder-only families with grouped-query attention and gated MLPs, and Hugging Face's usual names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megabatch.converters.family import Ignorable
from megabatch.converters.mapping import Experts, GateUp, Qkv, Rename, Row, Transposed, TransposedGateUp
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

_L, _HF = "decoder.layers.{l}.", "model.layers.{l}."

EMBEDDING: tuple[Row, ...] = (
    Rename("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden"), split="vocab"),
)

OUTPUT: tuple[Row, ...] = (
    Rename("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    Rename("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), split="vocab",
           when="has_output_layer"),
    Rename("output_layer.weight", "score.weight", ("labels", "hidden"), when="num_labels"),
    Rename("output_layer.bias", "score.bias", ("labels",), when="head_bias"),
)  # fmt: skip

ATTENTION: tuple[Row, ...] = (
    Rename(_L + "self_attention.linear_qkv.layer_norm_weight", _HF + "input_layernorm.weight", ("hidden",)),
    Qkv(_L + "self_attention.linear_qkv.weight", _HF + "self_attn.{q_proj,k_proj,v_proj}.weight",
        ("heads", "hidden"), split="column"),
    Qkv(_L + "self_attention.linear_qkv.bias", _HF + "self_attn.{q_proj,k_proj,v_proj}.bias",
        ("heads",), split="column", when="add_qkv_bias"),
    Rename(_L + "self_attention.q_layernorm.weight", _HF + "self_attn.q_norm.weight", ("head",), when="qk_layernorm"),
    Rename(_L + "self_attention.k_layernorm.weight", _HF + "self_attn.k_norm.weight", ("head",), when="qk_layernorm"),
    Rename(_L + "self_attention.linear_proj.weight", _HF + "self_attn.o_proj.weight", ("hidden", "heads"),
           split="row"),
    Rename(_L + "self_attention.linear_proj.bias", _HF + "self_attn.o_proj.bias", ("hidden",),
           when="attention_output_bias"),
)  # fmt: skip

DENSE_MLP: tuple[Row, ...] = (
    Rename(_L + "mlp.linear_fc1.layer_norm_weight", _HF + "post_attention_layernorm.weight", ("hidden",),
           layers="dense"),
    GateUp(_L + "mlp.linear_fc1.weight", _HF + "mlp.{gate_proj,up_proj}.weight", ("ffn", "hidden"), split="column",
           layers="dense"),
    GateUp(_L + "mlp.linear_fc1.bias", _HF + "mlp.{gate_proj,up_proj}.bias", ("ffn",), split="column",
           layers="dense", when="mlp_bias"),
    Rename(_L + "mlp.linear_fc2.weight", _HF + "mlp.down_proj.weight", ("hidden", "ffn"), split="row",
           layers="dense"),
    Rename(_L + "mlp.linear_fc2.bias", _HF + "mlp.down_proj.bias", ("hidden",), layers="dense", when="mlp_bias"),
)  # fmt: skip

_ROUTER = "mlp.gate.weight"
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def moe_mlp(
    *,
    router: str = _ROUTER,
    gate_up: str = "mlp.experts.{e}.{gate_proj,up_proj}.weight",
    down: str = "mlp.experts.{e}.down_proj.weight",
) -> tuple[Row | Experts, ...]:
    """Norm, router and experts of a layer, by their names after the layer's prefix in a folder; fused experts and the
    router next to them have the same names in every family."""
    return (
        Rename(_L + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight", ("hidden",), layers="moe"),
        Rename(_L + "mlp.router.weight", _HF + router, ("experts", "hidden"), layers="moe", hf_fused=_HF + _ROUTER),
        Experts(
            GateUp(_L + "mlp.experts.linear_fc1.weight", _HF + gate_up, ("expert_ffn", "hidden"), split="column"),
            fused=_HF + _GATE_UP,
        ),
        Experts(
            Rename(_L + "mlp.experts.linear_fc2.weight", _HF + down, ("hidden", "expert_ffn"), split="row"),
            fused=_HF + _DOWN,
        ),
    )


def transposed_experts() -> tuple[Row | Experts, ...]:
    """`moe_mlp` for folders that hold all experts of a layer in one tensor, each expert transposed."""
    norm_and_router = moe_mlp()[:2]
    return (
        *norm_and_router,
        Experts(
            TransposedGateUp(_L + "mlp.experts.linear_fc1.weight", _HF + _GATE_UP, ("expert_ffn", "hidden"),
                             split="column"),
            fused=_HF + _GATE_UP,
        ),
        Experts(
            Transposed(_L + "mlp.experts.linear_fc2.weight", _HF + _DOWN, ("hidden", "expert_ffn"), split="row"),
            fused=_HF + _DOWN,
        ),
    )  # fmt: skip


def shared_experts(name: str = "mlp.shared_experts") -> tuple[Row, ...]:
    """The shared experts as one MLP, with a gate on their output if the model has one."""
    ours, theirs = _L + "mlp.shared_experts.", f"{_HF}{name}."
    when = "moe_shared_expert_intermediate_size"
    return (
        GateUp(ours + "linear_fc1.weight", theirs + "{gate_proj,up_proj}.weight", ("shared_ffn", "hidden"),
               split="column", layers="moe", when=when),
        Rename(ours + "linear_fc2.weight", theirs + "down_proj.weight", ("hidden", "shared_ffn"), split="row",
               layers="moe", when=when),
        Rename(ours + "gate_weight", f"{_HF}{name}_gate.weight", ("one", "hidden"), layers="moe",
               when="moe_shared_expert_gate"),
    )  # fmt: skip


EXPERT_BIAS = Rename(
    _L + "mlp.router.expert_bias", _HF + "mlp.gate.e_score_correction_bias", ("experts",), layers="moe", dtype="F32",
    when="moe_router_enable_expert_bias",
)  # fmt: skip


def mtp(layer: tuple[Row | Experts, ...]) -> tuple[Row | Experts, ...]:
    """MTP layers, which Hugging Face numbers after the decoder's, around a decoder layer's rows.

    A layer also brings a copy of the embedding and one of the output layer: `MTP_COPIES`.
    """
    ours = "mtp.layers.{m}."
    return (
        Rename(ours + "enorm.weight", _HF + "enorm.weight", ("hidden",)),
        Rename(ours + "hnorm.weight", _HF + "hnorm.weight", ("hidden",)),
        Rename(ours + "eh_proj.weight", _HF + "eh_proj.weight", ("hidden", "two_hidden"), split="column"),
        *(moved(row, ours + "transformer_layer.", _HF) for row in layer),
        Rename(ours + "final_layernorm.weight", _HF + "shared_head.norm.weight", ("hidden",)),
    )


def moved(row: Row | Experts, ours: str, theirs: str) -> Row | Experts:
    """Moves a decoder layer's row to another layer, given the prefixes of both sides' names there."""
    return renamed(row, ours=lambda name: name.replace(_L, ours), theirs=lambda name: name.replace(_HF, theirs))


Renaming = Callable[[str], str]


def renamed(row: Row | Experts, *, ours: Renaming, theirs: Renaming) -> Row | Experts:
    """The same row with other names on both sides."""
    if isinstance(row, Experts):
        return replace(row, row=_renamed(row.row, ours, theirs), fused=row.fused and theirs(row.fused))
    return _renamed(row, ours, theirs)


def _renamed(row: Row, ours: Renaming, theirs: Renaming) -> Row:
    hf_fused = row.hf_fused and theirs(row.hf_fused)
    return replace(row, name=ours(row.name), hf=theirs(row.hf), hf_fused=hf_fused)


MTP_COPIES = {
    _HF + "embed_tokens.weight": "model.embed_tokens.weight",
    _HF + "shared_head.head.weight": "lm_head.weight",
}

TIED = {"lm_head.weight": "model.embed_tokens.weight"}

ROTARY_BUFFERS = Ignorable(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq",
    "rotary frequencies are computed from config.json",
)


def not_made(shape: ModelShape, **_: Any) -> dict[str, Any]:
    """`Family.hf_config` of a family whose config.json we only read. Raises: ConversionError."""
    raise ConversionError(f"{shape.model_type}: megabatch cannot create a new model of this family, only convert one")
