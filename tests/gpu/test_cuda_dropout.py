"""Dropout and fused kernels on a GPU: the masks of a recomputation and of a resumed run, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_runs import cuda_run, require_gpus, train_on
from rank_server import RankServer
from runs import curve

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
HALF = {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_and_resume_draw_the_same_masks(layout: str, gpus: RankServer, tmp_path: Path) -> None:
    world_size = 1 if layout == "single" else 2
    require_gpus(world_size)
    groups: dict[str, dict[str, Any]] = {
        "model": {**HALF, "attention_dropout": 0.2, "hidden_dropout": 0.1},
        "training": {"deterministic_mode": True},
        "parallel": LAYOUTS[layout],
    }
    runs = {
        name: cuda_run(tmp_path, name, "qwen3", world_size=world_size, **groups, recompute=recompute)
        for name, recompute in {"kept": {"recompute_granularity": "none"}, "again": FULL, "cut": {}}.items()
    }
    train_on(gpus, runs["kept"], world_size=world_size)
    train_on(gpus, runs["again"], world_size=world_size)
    train_on(gpus, runs["cut"], world_size=world_size, stop_after=2)
    train_on(gpus, runs["cut"], world_size=world_size)
    assert curve(runs["again"]) == curve(runs["kept"])
    assert curve(runs["cut"]) == curve(runs["kept"])


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
def test_fused_kernels_compute_the_same(model: str, gpus: RankServer, tmp_path: Path) -> None:
    plain = {"no_bias_swiglu_fusion": True, "no_bias_dropout_fusion": True}
    fused, parts = cuda_run(tmp_path, "fused", model), cuda_run(tmp_path, "parts", model, kernels=plain)
    train_on(gpus, fused)
    train_on(gpus, parts)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(fused), curve(parts), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-4)), f"step {step}"


def test_a_sliding_window_trains_in_bfloat16_along_fp32(gpus: RankServer, tmp_path: Path) -> None:
    window: dict[str, Any] = {"window_size": "7,0", "hidden_size": 128, "kv_channels": 32}
    exact = cuda_run(tmp_path, "fp32", "qwen2", model=window)
    rounded = cuda_run(tmp_path, "bf16", "qwen2", model={**window, "torch_dtype": "bfloat16"})
    train_on(gpus, exact)
    train_on(gpus, rounded)
    for (step, loss, _), (_, expected, _) in zip(curve(rounded), curve(exact), strict=True):
        assert loss == pytest.approx(expected, rel=3e-2), f"step {step}"
