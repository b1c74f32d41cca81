"""Small random models, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_BASE = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3-tied-twelve-heads": (
        "Qwen3",
        {"head_dim": 6, "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen3-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {**_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-tied": ("Qwen3Moe", {**_MOE, "num_experts": 6, "tie_word_embeddings": True, "head_dim": 10}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """Each case in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def cases() -> list[str]:
    """The names of all cases."""
    return list(CASES)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`saved(case)`: a folder with the random model of `CASES[case]`, made once."""
    folders: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in folders:
            folders[case] = _save(tmp_path_factory.mktemp(case), *CASES[case])
        return folders[case]

    return make


def _save(folder: Path, prefix: str, changes: dict[str, Any]) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**_BASE | changes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder
