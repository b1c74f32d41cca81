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


class Case(NamedTuple):
    """A model: transformers' class (without `Config` or `For…`), its settings, and the same table by hand."""

    prefix: str
    changes: dict[str, Any]
    expected: Callable[[by_hand.Arrays, Any], by_hand.Tensors]
    head: str = "ForCausalLM"

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
}
