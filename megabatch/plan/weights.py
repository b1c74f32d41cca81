"""Every parameter tensor of a model by its shape: what sizes, estimates and floating-point operations count.

Names and shapes are those of megatron-core's modules with Transformer Engine; the mapping tables of the converters
name the same tensors for moving their bytes, and tests hold the two against each other.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

Split = Literal["column", "row", "vocab", "replicated"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One whole parameter tensor; an expert's stands for each expert of its layer."""

    name: str
    """Within its layer, or within the model: `self_attention.linear_qkv.weight`."""
    rows: int
    cols: int | None = None
    """None for a vector, which is not part of a matrix product."""
    split: Split = "replicated"
    """How tensor parallelism cuts it; an expert's is cut by expert tensor parallelism."""
    experts: int = 0
    """Number of experts that have one each; 0 outside experts."""
    trained: bool = True
    """False for a buffer of megatron-core, which has no gradient."""

    @property
    def elements(self) -> int:
        """Of one expert's, or of the tensor."""
        return self.rows * (self.cols or 1)

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether Muon updates it, where a run trains with Muon; a convolution's weight has three dimensions."""
        is_end = self.name.startswith(("embedding.", "output_layer."))
        return self.trained and self.cols is not None and not is_end and "conv1d" not in self.name

    def shard(self, *, tp: int, etp: int) -> int:
        """Elements on one rank."""
        if self.split == "replicated":
            return self.elements
        ways = etp if self.experts else tp
        # a vocabulary is padded, everything else divides
        return -(-self.rows // ways) * (self.cols or 1) if self.split == "vocab" else self.elements // ways


Kind = tuple[bool, bool]
"""The kind of a layer: mixture of experts or not, linear attention or not."""


def kinds(shape: ModelShape) -> list[Kind]:
    """One for each layer."""
    none = (False,) * shape.num_layers
    return list(zip(shape.moe_layers or none, shape.linear_attention_layers or none, strict=True))


def embedding(shape: ModelShape, *, vocab_size: int | None = None) -> Weight:
    """Args: vocab_size: rows with padding; None takes the model's."""
    return Weight("embedding.word_embeddings.weight", vocab_size or shape.vocab_size, shape.hidden_size, "vocab")


def output_layer(shape: ModelShape, *, vocab_size: int | None = None) -> Weight:
    """Scores for each label, or logits, whose weights are the embedding's where those are tied."""
    if shape.num_labels is not None:
        return Weight("output_layer.weight", shape.num_labels, shape.hidden_size)
    return Weight("output_layer.weight", vocab_size or shape.vocab_size, shape.hidden_size, "vocab")


def head_bias(shape: ModelShape) -> Weight:
    return Weight("output_layer.bias", shape.num_labels or 0)


def final_norm(shape: ModelShape) -> Weight:
    return Weight("decoder.final_layernorm.weight", shape.hidden_size)


@functools.lru_cache(maxsize=64)
def layer(shape: ModelShape, kind: Kind) -> tuple[Weight, ...]:
    """A transformer layer's tensors, in the order in which megatron-core registers them."""
    moe, linear = kind
    mixer = _linear_attention if linear else _latent_attention if shape.multi_latent_attention else _attention
    return (*mixer(shape), *(_experts(shape) if moe else _dense_mlp(shape)))


def mtp_layer(shape: ModelShape) -> tuple[Weight, ...]:
    """An MTP layer: the part that joins two streams, a decoder layer of the last kind, a norm."""
    hidden = shape.hidden_size
    return (
        Weight("enorm.weight", hidden),
        Weight("hnorm.weight", hidden),
        Weight("eh_proj.weight", hidden, 2 * hidden, "column"),
        *layer(shape, kinds(shape)[-1]),
        Weight("final_layernorm.weight", hidden),
    )


def model(shape: ModelShape) -> Iterator[tuple[Weight, int]]:
    """All tensors of the published model, tied embeddings once, each with the number of layers that have it."""
    yield embedding(shape), 1
    for kind, count in Counter(kinds(shape)).items():
        yield from ((weight, count) for weight in layer(shape, kind))
    if shape.mtp_num_layers:
        yield from ((weight, shape.mtp_num_layers) for weight in mtp_layer(shape))
    yield final_norm(shape), 1
    if shape.has_output_layer or shape.num_labels:
        yield output_layer(shape), 1
    if shape.head_bias:
        yield head_bias(shape), 1


def _attention(shape: ModelShape) -> Iterator[Weight]:
    hidden, head, name = shape.hidden_size, shape.kv_channels, "self_attention."
    heads = shape.num_attention_heads * head
    qkv = heads * (1 + shape.attention_output_gate) + 2 * shape.num_query_groups * head
    yield Weight("input_layernorm.weight", hidden)
    if shape.attention_sinks:
        yield Weight(name + "core_attention.softmax_offset", shape.num_attention_heads, None, "column")
    yield Weight(name + "linear_proj.weight", hidden, heads, "row")
    if shape.attention_output_bias:
        yield Weight(name + "linear_proj.bias", hidden)
    yield Weight(name + "linear_qkv.weight", qkv, hidden, "column")
    if shape.add_qkv_bias:
        yield Weight(name + "linear_qkv.bias", qkv, None, "column")
    if shape.qk_layernorm:
        yield Weight(name + "q_layernorm.weight", head)
        yield Weight(name + "k_layernorm.weight", head)
    if shape.post_layernorms:
        yield Weight(name + "linear_proj.post_layernorm.weight", hidden)


def _latent_attention(shape: ModelShape) -> Iterator[Weight]:
    """Multi-latent attention (arXiv:2405.04434, section 2.1)."""
    hidden, heads, name = shape.hidden_size, shape.num_attention_heads, "self_attention."
    plain, rotated, value = shape.qk_head_dim or 0, shape.qk_pos_emb_head_dim or 0, shape.v_head_dim or 0
    queries, latent = heads * (plain + rotated), shape.kv_lora_rank or 0
    yield Weight("input_layernorm.weight", hidden)
    yield Weight(name + "linear_proj.weight", hidden, heads * value, "row")
    if shape.q_lora_rank is None:
        yield Weight(name + "linear_q_proj.weight", queries, hidden, "column")
    else:
        yield Weight(name + "linear_q_down_proj.weight", shape.q_lora_rank, hidden)
        yield Weight(name + "linear_q_up_proj.weight", queries, shape.q_lora_rank, "column")
    yield Weight(name + "linear_kv_down_proj.weight", latent + rotated, hidden)
    yield Weight(name + "linear_kv_up_proj.weight", heads * (plain + value), latent, "column")
    if shape.q_lora_rank is not None:
        yield Weight(name + "q_layernorm.weight", shape.q_lora_rank)
    yield Weight(name + "kv_layernorm.weight", latent)


def _linear_attention(shape: ModelShape) -> Iterator[Weight]:
    """Gated delta net (arXiv:2412.06464), as in Qwen3-Next."""
    hidden, name, heads = shape.hidden_size, "self_attention.", shape.linear_num_value_heads or 0
    keys = (shape.linear_num_key_heads or 0) * (shape.linear_key_head_dim or 0)
    values = heads * (shape.linear_value_head_dim or 0)
    yield Weight("input_layernorm.weight", hidden)
    yield Weight(name + "dt_bias", heads, None, "column")
    yield Weight(name + "A_log", heads, None, "column")
    yield Weight(name + "in_proj.weight", 2 * keys + 2 * values + 2 * heads, hidden, "column")
    yield Weight(name + "conv1d.weight", 2 * keys + values, shape.linear_conv_kernel_dim or 0, "column")
    yield Weight(name + "out_norm.weight", shape.linear_value_head_dim or 0)
    yield Weight(name + "out_proj.weight", hidden, values, "row")


def _dense_mlp(shape: ModelShape) -> Iterator[Weight]:
    hidden, width = shape.hidden_size, shape.ffn_hidden_size
    yield Weight("pre_mlp_layernorm.weight", hidden)
    yield from _gated("mlp.", hidden, width, bias=shape.mlp_bias)
    if shape.post_layernorms:
        yield Weight("mlp.linear_fc2.post_layernorm.weight", hidden)


def _experts(shape: ModelShape) -> Iterator[Weight]:
    """Router, experts, and shared experts."""
    hidden, count = shape.hidden_size, shape.num_experts or 0
    yield Weight("pre_mlp_layernorm.weight", hidden)
    yield Weight("mlp.router.weight", count, hidden)
    if shape.mlp_bias:
        yield Weight("mlp.router.bias", count)
    yield from _gated("mlp.experts.", hidden, shape.moe_ffn_hidden_size or 0, bias=shape.mlp_bias, experts=count)
    if shape.moe_router_enable_expert_bias:
        yield Weight("mlp.router.expert_bias", count, trained=False)
    if shape.moe_shared_expert_intermediate_size:
        if shape.moe_shared_expert_gate:
            yield Weight("mlp.shared_experts.gate_weight", 1, hidden)
        yield from _gated("mlp.shared_experts.", hidden, shape.moe_shared_expert_intermediate_size, bias=False)


def _gated(name: str, hidden: int, width: int, *, bias: bool, experts: int = 0) -> Iterator[Weight]:
    """An MLP whose first matrix holds gate and up projection."""
    yield Weight(name + "linear_fc1.weight", 2 * width, hidden, "column", experts)
    if bias:
        yield Weight(name + "linear_fc1.bias", 2 * width, None, "column", experts)
    yield Weight(name + "linear_fc2.weight", hidden, width, "row", experts)
    if bias:
        yield Weight(name + "linear_fc2.bias", hidden, None, "replicated", experts)
