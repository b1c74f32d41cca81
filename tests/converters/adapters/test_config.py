"""Which modules have adapters, of what rank and scale: as peft itself decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from megabatch.converters.adapters.config import checked

MODULES = [
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 11) for name in ("q_proj", "k_proj", "o_proj")),
    *(f"model.layers.{layer}.mlp.experts.{expert}.gate_proj" for layer in (1, 2) for expert in (0, 11)),
    "model.layers.1.mlp.gate", "model.layers.1.mlp.shared_experts.gate_proj", "model.embed_tokens", "lm_head",
]  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "gate_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.embed_tokens", "head"]},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": "model"},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["gate_proj"], "layers_to_transform": 2},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["gate_proj"], "layers_to_transform": [11], "layers_pattern": ["experts"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "gate", "lm_head"], "modules_to_save": ["lm_head", "mlp"]},
    {"target_parameters": ["mlp.experts.gate_up_proj"]},
]
PATTERNS: list[dict[str, int]] = [
    {"q_proj": 3, r"model\.layers\.1\..*": 5},
    {r"model\.layers\.1\..*": 5, "q_proj": 3},
    {"^model.layers.11.self_attn.k_proj": 7, r".*\.gate_proj": 2},
    {"proj": 9},
    {r"experts\.\d+\.gate_proj": 6, "gate": 4},
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_targets_are_pefts(values: dict[str, Any]) -> None:
    ours = checked(Path("adapter_config.json"), {"peft_type": "LORA", **values})
    theirs = peft.LoraConfig(**values)
    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_are_pefts(patterns: dict[str, int], rslora: bool) -> None:
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 12, "rank_pattern": patterns, "alpha_pattern": patterns}
    ours = checked(Path("adapter_config.json"), values | {"use_rslora": rslora})
    for module in MODULES:
        rank, alpha = (patterns.get(get_pattern_key(patterns, module), other) for other in (8, 12))
        assert ours.rank(module) == rank
        assert ours.scale(module, rank) == alpha / (rank**0.5 if rslora else rank)
        assert ours.alpha_for(ours.scale(module, rank), rank) == alpha
