"""megatron-core's tensors from Hugging Face's, family by family, by plain numpy: what the tables are compared with.

Each tensor comes as a `Cut`: the parts that tensor parallelism cuts one by one, and how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megabatch.plan.shape import ModelShape

Arrays = dict[str, np.ndarray]
PADDED_VOCAB = 64


class Cut(NamedTuple):
    parts: list[np.ndarray]
    how: str

    def shard(self, rank: int, tp: int) -> np.ndarray:
        if self.how == "whole":
            return self.parts[0]
        if self.how == "columns":
            return np.split(self.parts[0], tp, axis=1)[rank]
        if self.how == "vocab":
            padded = np.zeros((PADDED_VOCAB, self.parts[0].shape[1]), self.parts[0].dtype)
            padded[: len(self.parts[0])] = self.parts[0]
            return np.split(padded, tp)[rank]
        return np.concatenate([np.split(part, tp)[rank] for part in self.parts])


def whole(array: np.ndarray) -> Cut:
    return Cut([array], "whole")


def rows(*parts: np.ndarray) -> Cut:
    return Cut(list(parts), "rows")


def columns(array: np.ndarray) -> Cut:
    return Cut([array], "columns")


Tensors = dict[tuple[str, int | None], Cut]


class Tables:
    """Collects a model's tensors; `at` and `of` say which layer of which side is being filled in."""

    def __init__(self, hf: Arrays, shape: ModelShape) -> None:
        self.hf, self.shape = hf, shape
        self.out: Tensors = {}
        self.at = self.of = ""

    def put(self, name: str, cut: Cut, expert: int | None = None) -> None:
        assert (self.at + name, expert) not in self.out
        self.out[self.at + name, expert] = cut

    def get(self, name: str) -> np.ndarray:
        return self.hf[self.of + name]

    def has(self, name: str) -> bool:
        return self.of + name in self.hf

    def layer(self, number: int, prefix: str = "model.") -> None:
        self.at, self.of = f"decoder.layers.{number}.", f"{prefix}layers.{number}."

    def ends(self, prefix: str = "model.", head: str = "lm_head.weight") -> None:
        self.at = self.of = ""
        self.put("embedding.word_embeddings.weight", Cut([self.get(f"{prefix}embed_tokens.weight")], "vocab"))
        self.put("decoder.final_layernorm.weight", whole(self.get(f"{prefix}norm.weight")))
        if head in self.hf:
            self.put("output_layer.weight", Cut([self.get(head)], "vocab"))

    def attention(self) -> None:
        groups = self.shape.num_query_groups
        self.put("self_attention.linear_qkv.layer_norm_weight", whole(self.get("input_layernorm.weight")))
        for kind in ("weight", "bias"):
            if self.has(f"self_attn.q_proj.{kind}"):
                qkv = [self.get(f"self_attn.{x}_proj.{kind}") for x in "qkv"]
                tail = qkv[0].shape[1:]
                fused = np.concatenate([x.reshape(groups, -1, *tail) for x in qkv], axis=1)
                self.put(f"self_attention.linear_qkv.{kind}", rows(fused.reshape(-1, *tail)))
        for x in "qk":
            if self.has(f"self_attn.{x}_norm.weight"):
                self.put(f"self_attention.{x}_layernorm.weight", whole(self.get(f"self_attn.{x}_norm.weight")))
        self.put("self_attention.linear_proj.weight", columns(self.get("self_attn.o_proj.weight")))
        if self.has("self_attn.o_proj.bias"):
            self.put("self_attention.linear_proj.bias", whole(self.get("self_attn.o_proj.bias")))

    def dense(self, norm: str = "post_attention_layernorm.weight") -> None:
        self.put("mlp.linear_fc1.layer_norm_weight", whole(self.get(norm)))
        gate, up = (self.get(f"mlp.{x}_proj.weight") for x in ("gate", "up"))
        self.put("mlp.linear_fc1.weight", rows(gate, up))
        self.put("mlp.linear_fc2.weight", columns(self.get("mlp.down_proj.weight")))

    def experts(self, router: str, names: tuple[str, str, str]) -> None:
        """`names`: gate, up and down of expert `{}`."""
        self.put("pre_mlp_layernorm.weight", whole(self.get("post_attention_layernorm.weight")))
        self.put("mlp.router.weight", whole(self.get(router)))
        for e in range(self.shape.num_experts or 0):
            gate, up, down = (self.get(name.format(e)) for name in names)
            self.put("mlp.experts.linear_fc1.weight", rows(gate, up), e)
            self.put("mlp.experts.linear_fc2.weight", columns(down), e)

    def transposed_experts(self) -> None:
        self.put("pre_mlp_layernorm.weight", whole(self.get("post_attention_layernorm.weight")))
        self.put("mlp.router.weight", whole(self.get("mlp.gate.weight")))
        for e, both in enumerate(self.get("mlp.experts.gate_up_proj")):
            self.put("mlp.experts.linear_fc1.weight", rows(*np.split(both.T, 2)), e)
            self.put("mlp.experts.linear_fc2.weight", columns(self.get("mlp.experts.down_proj")[e].T), e)

    def routed_and_shared(self, gate: str | None = None, shared: str = "shared_experts") -> None:
        self.experts("mlp.gate.weight", USUAL)
        if self.has("mlp.gate.e_score_correction_bias"):
            self.put("mlp.router.expert_bias", whole(self.get("mlp.gate.e_score_correction_bias")))
        if self.has(f"mlp.{shared}.up_proj.weight"):
            up, down, gate_proj = (self.get(f"mlp.{shared}.{x}_proj.weight") for x in ("up", "down", "gate"))
            self.put("mlp.shared_experts.linear_fc1.weight", rows(gate_proj, up))
            self.put("mlp.shared_experts.linear_fc2.weight", columns(down))
        if gate:
            self.put("mlp.shared_experts.gate_weight", whole(self.get(gate)))

    def latent_attention(self) -> None:
        ours = "self_attention.linear_"
        self.put("input_layernorm.weight", whole(self.get("input_layernorm.weight")))
        if self.has("self_attn.q_proj.weight"):
            self.put(ours + "q_proj.weight", rows(self.get("self_attn.q_proj.weight")))
        else:
            self.put(ours + "q_down_proj.weight", whole(self.get("self_attn.q_a_proj.weight")))
            self.put(ours + "q_up_proj.layer_norm_weight", whole(self.get("self_attn.q_a_layernorm.weight")))
            self.put(ours + "q_up_proj.weight", rows(self.get("self_attn.q_b_proj.weight")))
        self.put(ours + "kv_down_proj.weight", whole(self.get("self_attn.kv_a_proj_with_mqa.weight")))
        self.put(ours + "kv_up_proj.layer_norm_weight", whole(self.get("self_attn.kv_a_layernorm.weight")))
        self.put(ours + "kv_up_proj.weight", rows(self.get("self_attn.kv_b_proj.weight")))
        self.put(ours + "proj.weight", columns(self.get("self_attn.o_proj.weight")))


USUAL = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight")


def mixtral(hf: Arrays, shape: ModelShape) -> Tensors:
    tables = Tables(hf, shape)
    tables.ends()
    for layer in range(shape.num_layers):
        tables.layer(layer)
        tables.attention()
        experts = "block_sparse_moe.experts.{}."
        tables.experts("block_sparse_moe.gate.weight", tuple(experts + x + ".weight" for x in ("w1", "w3", "w2")))  # type: ignore[arg-type]
    return tables.out


def _latent_layer(tables: Tables) -> None:
    tables.latent_attention()
    if tables.has("mlp.gate.weight"):
        tables.routed_and_shared()
    else:
        tables.dense()


def _glm_layer(tables: Tables) -> None:
    tables.attention()
    if tables.has("mlp.gate.weight"):
        tables.routed_and_shared()
    else:
        tables.dense()


def _with_mtp(hf: Arrays, shape: ModelShape, fill: Callable[[Tables], None]) -> Tensors:
    tables = Tables(hf, shape)
    tables.ends()
    for layer in range(shape.num_layers):
        tables.layer(layer)
        fill(tables)
    for depth in range(shape.mtp_num_layers or 0):
        tables.at, tables.of = f"mtp.layers.{depth}.", f"model.layers.{shape.num_layers + depth}."
        for norm in ("enorm", "hnorm"):
            tables.put(f"{norm}.weight", whole(tables.get(f"{norm}.weight")))
        tables.put("eh_proj.weight", rows(tables.get("eh_proj.weight")))
        tables.put("final_layernorm.weight", whole(tables.get("shared_head.norm.weight")))
        tables.at += "transformer_layer."
        fill(tables)
    return tables.out


def deepseek(hf: Arrays, shape: ModelShape) -> Tensors:
    return _with_mtp(hf, shape, _latent_layer)


def glm4_moe(hf: Arrays, shape: ModelShape) -> Tensors:
    return _with_mtp(hf, shape, _glm_layer)


def plain(hf: Arrays, shape: ModelShape) -> Tensors:
    """Grouped attention and a dense MLP; with a score head where there is one."""
    tables = Tables(hf, shape)
    tables.ends()
    if "score.weight" in hf:
        tables.put("output_layer.weight", whole(hf["score.weight"]))
    if "score.bias" in hf:
        tables.put("output_layer.bias", whole(hf["score.bias"]))
    for layer in range(shape.num_layers):
        tables.layer(layer)
        tables.attention()
        tables.dense()
    return tables.out


def gemma3(hf: Arrays, shape: ModelShape, outer: str = "", inner: str = "model.") -> Tensors:
    tables = Tables(hf, shape)
    tables.ends(outer + inner, outer + "lm_head.weight")
    for layer in range(shape.num_layers):
        tables.layer(layer, outer + inner)
        tables.attention()
        after, behind = "self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight"
        tables.put(after, whole(tables.get("post_attention_layernorm.weight")))
        tables.dense(norm="pre_feedforward_layernorm.weight")
        tables.put(behind, whole(tables.get("post_feedforward_layernorm.weight")))
    return tables.out


def inside(outer: str, inner: str) -> Callable[[Arrays, ModelShape], Tensors]:
    """The language part of a model that sees images."""

    def fill(hf: Arrays, shape: ModelShape) -> Tensors:
        if shape.post_layernorms:
            return gemma3(hf, shape, outer, inner)
        tables = Tables(hf, shape)
        tables.ends(outer + inner, outer + "lm_head.weight")
        for layer in range(shape.num_layers):
            tables.layer(layer, outer + inner)
            tables.attention()
            if shape.num_experts:
                tables.transposed_experts()
            else:
                tables.dense()
        return tables.out

    return fill


def gpt_oss(hf: Arrays, shape: ModelShape) -> Tensors:
    tables = Tables(hf, shape)
    tables.ends()
    for layer in range(shape.num_layers):
        tables.layer(layer)
        tables.attention()
        tables.put("self_attention.core_attention.softmax_offset", rows(tables.get("self_attn.sinks")))
        tables.put("pre_mlp_layernorm.weight", whole(tables.get("post_attention_layernorm.weight")))
        tables.put("mlp.router.weight", whole(tables.get("mlp.router.weight")))
        tables.put("mlp.router.bias", whole(tables.get("mlp.router.bias")))
        for e in range(shape.num_experts or 0):
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                gate_up = tables.get("mlp.experts.gate_up_proj" + suffix)[e].T
                tables.put(f"mlp.experts.linear_fc1.{kind}", rows(gate_up[0::2], gate_up[1::2]), e)
            tables.put("mlp.experts.linear_fc2.weight", columns(tables.get("mlp.experts.down_proj")[e].T), e)
            tables.put("mlp.experts.linear_fc2.bias", whole(tables.get("mlp.experts.down_proj_bias")[e]), e)
    return tables.out


def _linear_attention(tables: Tables) -> None:
    shape, ours = tables.shape, "self_attention."
    groups, hidden = shape.linear_num_key_heads or 0, shape.hidden_size
    key, value = shape.linear_key_head_dim or 0, shape.linear_value_head_dim or 0
    ratio = (shape.linear_num_value_heads or 0) // groups
    tables.put(ours + "in_proj.layer_norm_weight", whole(tables.get("input_layernorm.weight")))
    qkvz = tables.get("linear_attn.in_proj_qkvz.weight").reshape(groups, -1, hidden)
    for name, part in zip(
        ("query", "key", "value", "z"), np.split(qkvz, [key, 2 * key, 2 * key + ratio * value], axis=1), strict=True
    ):
        tables.put(f"{ours}in_proj.weight.{name}", rows(part.reshape(-1, hidden)))
    ba = tables.get("linear_attn.in_proj_ba.weight").reshape(groups, 2, ratio, hidden)
    for i, name in enumerate(("beta", "alpha")):
        tables.put(f"{ours}in_proj.weight.{name}", rows(ba[:, i].reshape(-1, hidden)))
    conv = np.split(tables.get("linear_attn.conv1d.weight"), [groups * key, 2 * groups * key])
    for name, part in zip(("query", "key", "value"), conv, strict=True):
        tables.put(f"{ours}conv1d.weight.{name}", rows(part))
    for name in ("A_log", "dt_bias"):
        tables.put(ours + name, rows(tables.get(f"linear_attn.{name}")))
    tables.put(ours + "out_norm.weight", whole(tables.get("linear_attn.norm.weight") - 1))
    tables.put(ours + "out_proj.weight", columns(tables.get("linear_attn.out_proj.weight")))


def _gated_attention(tables: Tables) -> None:
    """Plain attention, with the gates' rows between a group's queries and its key."""
    shape, hidden = tables.shape, tables.shape.hidden_size
    groups, head = shape.num_query_groups, shape.kv_channels
    query_gate = tables.get("self_attn.q_proj.weight").reshape(groups, -1, 2, head, hidden)
    query, gate = (query_gate[:, :, i].reshape(groups, -1, hidden) for i in (0, 1))
    key, value = (tables.get(f"self_attn.{x}_proj.weight").reshape(groups, head, hidden) for x in "kv")
    fused = np.concatenate([query, gate, key, value], axis=1).reshape(-1, hidden)
    tables.attention()
    tables.out[tables.at + "self_attention.linear_qkv.weight", None] = rows(fused)


def qwen3_next(hf: Arrays, shape: ModelShape) -> Tensors:
    def mlp() -> None:
        if tables.has("mlp.gate.weight"):
            tables.routed_and_shared(gate="mlp.shared_expert_gate.weight", shared="shared_expert")
        else:
            tables.dense()

    tables = Tables(hf, shape)
    tables.ends()
    for layer in range(shape.num_layers):
        tables.layer(layer)
        (_linear_attention if tables.has("linear_attn.A_log") else _gated_attention)(tables)
        mlp()
    if shape.mtp_num_layers:
        tables.at, tables.of = "mtp.layers.0.", "mtp."
        for ours, theirs in (
            ("enorm", "pre_fc_norm_embedding"), ("hnorm", "pre_fc_norm_hidden"), ("final_layernorm", "norm")
        ):  # fmt: skip
            tables.put(f"{ours}.weight", whole(tables.get(f"{theirs}.weight")))
        tables.put("eh_proj.weight", rows(tables.get("fc.weight")))
        tables.at, tables.of = "mtp.layers.0.transformer_layer.", "mtp.layers.0."
        _gated_attention(tables)
        mlp()
    return tables.out
