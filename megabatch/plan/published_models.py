"""The published `config.json` of well-known models, for planning before a download.

A folder on this machine or in a hub's cache always wins over these facts. Sources: `config.json` of each repository
on huggingface.co, compared with citsjtu2020/LLM-Prof@8434c8d (`sglang/Model_Config.md`, verbatim copies) and
Lightning-AI/litgpt@0006c97 (`litgpt/config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_QWEN: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}

_QWEN3 = _QWEN | {"attention_bias": False, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}

_QWEN3_30B_A3B = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

_QWEN3_8B = _QWEN3 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

_QWEN2_5 = _QWEN | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
}

_QWEN2_5_7B = _QWEN2_5 | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}

_QWEN2_5_14B = _QWEN2_5 | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}

_LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Qwen/Qwen3-30B-A3B": _QWEN3_30B_A3B,
        "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN3_30B_A3B
        | {"max_position_embeddings": 262144, "rope_theta": 10000000.0},
        "Qwen/Qwen3-8B": _QWEN3_8B,
        "Qwen/Qwen2.5-7B": _QWEN2_5_7B,
        "Qwen/Qwen2.5-7B-Instruct": _QWEN2_5_7B | {"max_position_embeddings": 32768},
        "Qwen/Qwen2.5-14B": _QWEN2_5_14B,
        "Qwen/Qwen2.5-14B-Instruct": _QWEN2_5_14B | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
        "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
        "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1_8B,
    }
)
"""Hub name → the parts of its config.json that decide the model."""
