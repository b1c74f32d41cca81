"""Small random models of every family: shapes that catch what round numbers hide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import by_hand

_BASE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


_LATENT: dict[str, Any] = {
    "moe_intermediate_size": 12, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
    "num_key_value_heads": 6, "head_dim": ...,
}  # fmt: skip
_V3 = {**_LATENT, "n_group": 2, "topk_group": 1, "q_lora_rank": 10}
_GLM = {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2}


class Case(NamedTuple):
    """A model: transformers' class (without `Config` or `For…`), its settings, and the same table by hand."""

    prefix: str
    changes: dict[str, Any]
    expected: Callable[[by_hand.Arrays, Any], by_hand.Tensors]
    head: str = "ForCausalLM"
    mtp: bool = False
    """Whether a layer of multi-token prediction is added, which transformers does not save."""

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in (_BASE | self.changes).items() if value is not ...}


CASES: dict[str, Case] = {
    "mistral": Case("Mistral", {}, by_hand.mistral),
    "mistral-tied-window": Case("Mistral", {"tie_word_embeddings": True, "sliding_window": 16}, by_hand.mistral),
    "mistral-one-kv-head": Case("Mistral", {"num_key_value_heads": 1, "sliding_window": None}, by_hand.mistral),
    "mixtral": Case("Mixtral", {"num_local_experts": 3}, by_hand.mixtral),
    "mixtral-tied": Case(
        "Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": True}, by_hand.mixtral
    ),
    "deepseek-v2": Case("DeepseekV2", {**_LATENT, "q_lora_rank": 10}, by_hand.deepseek),
    "deepseek-v2-lite-tied": Case(
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": None, "n_shared_experts": 1, "tie_word_embeddings": True},
        by_hand.deepseek,
    ),
    "deepseek-v3": Case("DeepseekV3", _V3, by_hand.deepseek),
    "deepseek-v3-mtp": Case("DeepseekV3", {**_V3, "num_hidden_layers": 3}, by_hand.deepseek, mtp=True),
    "moonlight": Case(
        "DeepseekV3",
        {**_V3, "q_lora_rank": None, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
        by_hand.deepseek,
    ),
    "glm4-moe": Case("Glm4Moe", {**_GLM, "use_qk_norm": True, "attention_bias": True}, by_hand.glm4_moe),
    "glm4-moe-air-mtp": Case("Glm4Moe", {**_GLM, "n_shared_experts": 2}, by_hand.glm4_moe, mtp=True),
}
