"""Muon on GPUs: the losses of the CPU at every layout, a curve near it with bf16 products, an exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cuda_runs import cpu_run, cuda_run, require_gpus, train_on
from rank_server import RankServer
from runs import curve, evaluations

MUON: dict[str, Any] = {"optimizer": "muon", "muon_extra_scale_factor": 0.2}
EXACT: dict[str, Any] = {**MUON, "muon_fp32_matmul_prec": "highest"}
WHOLE: dict[str, Any] = {"use_distributed_optimizer": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "dp2": (2, {}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_the_cpu(layout: str, gpus: RankServer, cpus: RankServer, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    require_gpus(world_size)
    reference = cpu_run(tmp_path, "cpu", "qwen3_moe", optimizer=EXACT, parallel=WHOLE)
    run = cuda_run(
        tmp_path, "gpu", "qwen3_moe", world_size=world_size, optimizer=EXACT, parallel={**WHOLE, **parallel}
    )
    train_on(cpus, reference)
    train_on(gpus, run, world_size=world_size)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(run), curve(reference), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-3), pytest.approx(its_norm, rel=1e-2)), f"step {step}"


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
def test_bfloat16_learns_and_resumes_bit_for_bit(model: str, gpus: RankServer, tmp_path: Path) -> None:
    groups: dict[str, Any] = {
        "model": {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32},
        "training": {"train_iters": 6, "deterministic_mode": True},
        "checkpoint": {"save_interval": 3},
        "optimizer": MUON,
        "parallel": WHOLE,
    }
    run = cuda_run(tmp_path, "run", model, **groups)
    train_on(gpus, run)
    whole, losses = curve(run), [loss for _, loss in evaluations(run)]
    assert losses[-1] < losses[0]
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "metrics.jsonl").unlink()
    train_on(gpus, run)
    assert curve(run) == whole[3:]
