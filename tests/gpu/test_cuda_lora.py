"""LoRA on GPUs: the losses of the CPU, a curve near it in bf16, an exact resume with dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_runs import cpu_run, cuda_run, require_gpus, train_on
from rank_server import RankServer
from runs import curve, evaluations

LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2_sp_etp2": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_the_cpu(layout: str, gpus: RankServer, cpus: RankServer, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    require_gpus(world_size)
    reference = cpu_run(tmp_path, "cpu", "qwen3_moe", tuner=LORA)
    run = cuda_run(tmp_path, "gpu", "qwen3_moe", world_size=world_size, tuner=LORA, parallel=parallel)
    train_on(cpus, reference)
    train_on(gpus, run, world_size=world_size)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(run), curve(reference), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-4), pytest.approx(its_norm, rel=1e-3)), f"step {step}"


def test_bfloat16_learns_and_resumes_bit_for_bit(gpus: RankServer, tmp_path: Path) -> None:
    groups: dict[str, Any] = {
        "model": {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32},
        "tuner": {**LORA, "lora_dropout": 0.1},
        "training": {"train_iters": 8, "deterministic_mode": True},
        "checkpoint": {"save_interval": 4},
    }
    whole = cuda_run(tmp_path, "whole", "qwen3", **groups)
    train_on(gpus, whole)
    first, *_, last = [loss for _, loss in evaluations(whole)]
    assert last < first
    load = {"adapter_load": str(whole / "checkpoints" / "step_00000004"), **groups["tuner"]}
    moved = cuda_run(tmp_path, "moved", "qwen3", **{**groups, "tuner": load})
    train_on(gpus, moved)
    assert curve(moved) == curve(whole)[4:]
