"""Every tensor of every family against the converters' mapping tables: how many, how large, cut how."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

from megabatch.converters.families import FAMILIES, family_of
from megabatch.converters.mapping import Mapped
from megabatch.converters.shards import shard_shape
from megabatch.plan import weights
from megabatch.plan.model_size import num_active_parameters, num_parameters
from megabatch.plan.shape import ModelShape
from megabatch.plan.weights import Weight

BASE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
}  # fmt: skip
LATENT = {
    "moe_intermediate_size": 12, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
    "q_lora_rank": 10,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
TIED, SCORE = {"tie_word_embeddings": True}, {"num_labels": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {**TIED, "attention_bias": True, "mlp_bias": True}),
    "llama-score": ("LlamaForSequenceClassification", SCORE),
    "qwen2": ("Qwen2ForCausalLM", {"head_dim": 4}),
    "qwen2-reward": ("Qwen2ForSequenceClassification", {**TIED, **SCORE, "head_dim": 4}),
    "qwen3": ("Qwen3ForCausalLM", TIED),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "mlp_only_layers": [1]}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 16}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", {**LATENT, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**LATENT, "num_nextn_predict_layers": 1}),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        {
            **LATENT,
            "kv_lora_rank": None,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 1,
        },
    ),
    "gpt-oss": ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3": ("Gemma3ForCausalLM", {}),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 14,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 4,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
}


def config_of(name: str) -> dict[str, Any]:
    architecture, changes = MODELS[name]
    return BASE | changes | {"architectures": [architecture]}


def shape_of(name: str) -> ModelShape:
    return family_of(config_of(name)).shape(config_of(name))


def _rank_elements(found: Iterable[tuple[Weight, int]], *, tp: int, ep: int, etp: int) -> int:
    return sum(w.shard(tp=tp, etp=etp) * (w.experts // ep if w.experts else 1) * layers for w, layers in found)


def _table_elements(table: Iterable[Mapped], *, tp: int, ep: int, etp: int, experts: int, vocab: int) -> int:
    """The same from the mapping table: experts 0 … experts / ep - 1 lie on the first rank."""
    total = 0
    for mapped in table:
        if mapped.expert is None or mapped.expert < experts // ep:
            ways = tp if mapped.expert is None else etp
            total += math.prod(shard_shape(mapped, tp_size=ways, padded_vocab=vocab))
    return total


def test_every_family_is_here() -> None:
    inside = ("_vl", "llava", "mistral3", "gemma3")  # what stands around another family's decoder
    named = {family_of(config_of(name)).name for name in MODELS}
    assert {name for name in FAMILIES if not any(part in name for part in inside)} <= named


@pytest.mark.parametrize(
    ("name", "tp", "ep", "etp"),
    [
        (name, *sizes)
        for name in MODELS
        for sizes in [(1, 1, 1), (2, 1, 1), (2, 4, 1), (1, 2, 2)]
        if sizes[1:] == (1, 1) or shape_of(name).num_experts
    ],
)
def test_each_rank_holds_what_the_mapping_table_gives_it(name: str, *, tp: int, ep: int, etp: int) -> None:
    shape = shape_of(name)
    table = FAMILIES[shape.model_type].tensors(shape)
    experts = shape.num_experts or 1
    expected = _table_elements(table, tp=tp, ep=ep, etp=etp, experts=experts, vocab=60)
    assert _rank_elements(weights.model(shape), tp=tp, ep=ep, etp=etp) == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_every_tensor_on_disk(name: str) -> None:
    shape = shape_of(name)
    on_disk = FAMILIES[shape.model_type].hf_tensors(shape).values()
    assert num_parameters(shape) == sum(math.prod(size) for size in on_disk)


def test_a_vocabulary_is_filled_up() -> None:
    embedding = weights.embedding(shape_of("llama"))
    assert [embedding.shard(tp=tp, etp=1) for tp in (1, 8)] == [60 * 24, 8 * 24]


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    shape = shape_of("qwen3-moe")
    assert num_parameters(shape) - num_active_parameters(shape) == 2 * 2 * 3 * 24 * 12  # layers, experts, an expert
