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
_OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 20}
_NEXT = {
    "num_hidden_layers": 4, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 14, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 6, "linear_value_head_dim": 10,
}  # fmt: skip
_SCORE = {"num_labels": 3}
_PIXTRAL = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24}
_DEEP = {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_VL_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 1]}, "head_dim": ...}


class Case(NamedTuple):
    """A model: transformers' config class (without `Config`), its settings, and the same table by hand."""

    prefix: str
    changes: dict[str, Any]
    expected: Callable[[by_hand.Arrays, Any], by_hand.Tensors]
    model: str | None = None
    """transformers' class, by default the prefix with `ForCausalLM`."""
    mtp: bool = False
    """Whether a layer of multi-token prediction is added, which transformers does not save."""
    vision: dict[str, Any] | None = None
    """The settings of its vision part; `changes` are then the language part's."""

    transposed: bool = False
    """Whether it is published with each expert transposed, unlike transformers 5 saves it."""

    @property
    def fused(self) -> bool:
        """Whether transformers 5 can save its experts fused, which it does not do by itself."""
        return self.prefix in ("Mixtral", "DeepseekV2", "DeepseekV3", "Glm4Moe", "Qwen3Next") and not self.mtp

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in (_BASE | self.changes).items() if value is not ...}


CASES: dict[str, Case] = {
    "mistral": Case("Mistral", {}, by_hand.plain),
    "mistral-tied-window": Case("Mistral", {"tie_word_embeddings": True, "sliding_window": 16}, by_hand.plain),
    "mistral-one-kv-head": Case("Mistral", {"num_key_value_heads": 1, "sliding_window": None}, by_hand.plain),
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
    "glm4-moe-tied-mtp": Case("Glm4Moe", {**_GLM, "tie_word_embeddings": True}, by_hand.glm4_moe, mtp=True),
    "gpt-oss": Case("GptOss", _OSS, by_hand.gpt_oss),
    "gpt-oss-one-kv-head": Case("GptOss", {**_OSS, "num_key_value_heads": 1}, by_hand.gpt_oss),
    "gemma3": Case("Gemma3Text", {}, by_hand.gemma3, "Gemma3ForCausalLM"),
    "gemma3-untied": Case("Gemma3Text", {"tie_word_embeddings": False}, by_hand.gemma3, "Gemma3ForCausalLM"),
    "qwen3-next": Case("Qwen3Next", _NEXT, by_hand.qwen3_next),
    "qwen3-next-mixed": Case(
        "Qwen3Next",
        {**_NEXT, "mlp_only_layers": [0], "layer_types": ["linear_attention", "full_attention"] * 2},
        by_hand.qwen3_next,
    ),
    "llama-score": Case("Llama", _SCORE, by_hand.plain, "LlamaForSequenceClassification"),
    "qwen2-reward-tied": Case(
        "Qwen2",
        {"num_labels": 1, "tie_word_embeddings": True, "head_dim": ...},
        by_hand.plain,
        "Qwen2ForSequenceClassification",
    ),
    "qwen3-token-scores": Case("Qwen3", _SCORE, by_hand.plain, "Qwen3ForTokenClassification"),
    "qwen3-score-default-labels": Case("Qwen3", {}, by_hand.plain, "Qwen3ForSequenceClassification"),
    "gemma3-vision": Case(
        "Gemma3", {}, by_hand.inside("language_model.", "model."), "Gemma3ForConditionalGeneration",
        vision=_PIXTRAL,
    ),
    "llava": Case(
        "Llava", {"model_type": "llama"}, by_hand.inside("language_model.", "model."),
        "LlavaForConditionalGeneration", vision={**_PIXTRAL, "model_type": "clip_vision_model"},
    ),
    "mistral3": Case(
        "Mistral3", {"model_type": "mistral"}, by_hand.inside("language_model.", "model."),
        "Mistral3ForConditionalGeneration", vision={**_PIXTRAL, "model_type": "pixtral", "head_dim": 8},
    ),
    "qwen2-vl": Case(
        "Qwen2VL", {**_MROPE, "hidden_size": 60}, by_hand.inside("", "model."), "Qwen2VLForConditionalGeneration",
        vision={"depth": 1, "embed_dim": 16, "hidden_size": 60, "num_heads": 2, "mlp_ratio": 2},
    ),
    "qwen2.5-vl-tied": Case(
        "Qwen2_5_VL", {**_MROPE, "hidden_size": 60, "tie_word_embeddings": True}, by_hand.inside("", "model."),
        "Qwen2_5_VLForConditionalGeneration", vision={**_QWEN_VISION, "out_hidden_size": 60},
    ),
    "qwen3-vl": Case(
        "Qwen3VL", {}, by_hand.inside("", "model.language_model."), "Qwen3VLForConditionalGeneration", vision=_DEEP
    ),
    "qwen3-vl-moe": Case(
        "Qwen3VLMoe", _VL_MOE, by_hand.inside("", "model.language_model."), "Qwen3VLMoeForConditionalGeneration",
        vision=_DEEP, transposed=True,
    ),
}  # fmt: skip
