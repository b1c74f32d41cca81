"""Transformer Engine's precision-aware Adam on a GPU: fp32 state changes nothing, reduced state learns and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cuda_runs import cuda_run, train_on
from rank_server import RankServer
from runs import curve, evaluations

pytest.importorskip("transformer_engine", reason="the optimizer is Transformer Engine's")

GROUPS: dict[str, Any] = {
    "model": {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32},
    "training": {"train_iters": 6, "deterministic_mode": True},
    "checkpoint": {"save_interval": 3},
}
REDUCED: dict[str, Any] = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "main_grads_dtype": "bf16"}


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
def test_fp32_state_trains_as_without(model: str, gpus: RankServer, tmp_path: Path) -> None:
    plain = cuda_run(tmp_path, "plain", model, **GROUPS)
    aware = cuda_run(tmp_path, "aware", model, **GROUPS, optimizer={"use_precision_aware_optimizer": True})
    train_on(gpus, plain)
    train_on(gpus, aware)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(aware), curve(plain), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-3), pytest.approx(its_norm, rel=1e-2)), f"step {step}"


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
def test_reduced_state_learns_and_resumes_bit_for_bit(model: str, gpus: RankServer, tmp_path: Path) -> None:
    optimizer = {"use_precision_aware_optimizer": True, **REDUCED}
    run = cuda_run(tmp_path, "run", model, **GROUPS, optimizer=optimizer)
    train_on(gpus, run)
    whole, losses = curve(run), [loss for _, loss in evaluations(run)]
    assert losses[-1] < losses[0]
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "metrics.jsonl").unlink()
    train_on(gpus, run)
    assert curve(run) == whole[3:]
