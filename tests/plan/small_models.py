"""A small model of every family, with sizes that tell one dimension from another."""

from __future__ import annotations

from typing import Any

from megabatch.converters.families import family_of
from megabatch.plan.shape import ModelShape

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
    "qwen3-process-reward": ("Qwen3ForTokenClassification", {**TIED, **SCORE}),
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
