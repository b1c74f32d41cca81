"""Small runs that train adapters, and what they saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from runs import recipe, write_run
from safetensors.torch import load_file

LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0}
ALL = ["all-linear", "all-router", "all-embedding", "output_layer"]
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}


def run_of(folder: Path, name: str, model: str, world_size: int, groups: dict[str, Any]) -> Path:
    logged = {"logging": {"log_params_norm": True}}
    groups = {"bridge": {"merge_lora": False}, **logged, **groups, "resources": {"tasks_per_node": world_size}}
    tuner = {
        **LORA,
        "target_modules": ALL if model == "qwen3_moe" else ["all-linear", "all-embedding", "output_layer"],
    }
    return write_run(recipe(folder, model, tuner=tuner, **groups), folder / name)


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step_00000004" / "hf" / "adapter_model.safetensors")
