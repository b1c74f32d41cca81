"""On GPUs too a lost run goes on bit for bit, and what it saved loads in transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_runs import cuda_run, require_gpus, train_at_once, train_in_processes, train_on
from rank_server import RankServer
from runs import curve, evaluations

from megabatch.data.cache.token_cache import TokenCache

HALF = {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
def test_resume_is_bit_exact_in_deterministic_mode(model: str, dtype: str, gpus: RankServer, tmp_path: Path) -> None:
    whole = cuda_run(
        tmp_path,
        "whole",
        model,
        model={**HALF, "torch_dtype": dtype},
        training={"train_iters": 6, "deterministic_mode": True},
        checkpoint={"save_interval": 3},
    )
    train_on(gpus, whole)
    lost = tmp_path / "lost"
    shutil.copytree(whole, lost)
    made = json.loads((lost / "run.json").read_text())
    (lost / "run.json").write_text(json.dumps({**made, "run_dir": str(lost)}))
    shutil.rmtree(lost / "checkpoints" / "step_00000006")
    (lost / "metrics.jsonl").unlink()
    train_on(gpus, lost)
    assert [step for step, *_ in curve(lost)] == [4, 5, 6]
    assert curve(lost) == curve(whole)[3:]
    assert evaluations(lost) == [entry for entry in evaluations(whole) if entry[0] > 3]


EXPORTS: dict[str, tuple[str, float, int, dict[str, Any]]] = {
    "float32": ("float32", 1e-4, 1, {}),
    "bfloat16": ("bfloat16", 1e-2, 1, {}),
    "float32_tp2_ep2_pp2": (
        "float32",
        1e-4,
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
        },
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_the_exported_model_has_the_trainers_validation_loss(name: str, tmp_path: Path) -> None:
    dtype, tolerance, world_size, parallel = EXPORTS[name]
    require_gpus(world_size)
    model = {**HALF, "torch_dtype": dtype}
    run = cuda_run(tmp_path, "run", "qwen3_moe", world_size=world_size, model=model, parallel=parallel)
    train_in_processes(run, world_size=world_size)
    validation = min((TokenCache.open(path) for path in (run / "cache").iterdir() if path.is_dir()), key=len)
    expected = _transformers_loss(run / "checkpoints" / "step_00000004" / "hf", dtype, validation)
    assert evaluations(run)[-1][1] == pytest.approx(expected, rel=tolerance)


def _transformers_loss(folder: Path, dtype: str, data: TokenCache) -> float:
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, attn_implementation="eager"
    )
    assert not seen["missing_keys"] and not seen["unexpected_keys"]
    model = model.cuda()
    total = weight = 0.0
    with torch.no_grad():
        for sample in (data[i] for i in range(len(data))):
            ids = torch.from_numpy(sample.ids.astype(np.int64))[None].cuda()
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            weights = torch.from_numpy(sample.weights[1:].copy()).double().cuda()
            total, weight = total - float((logps * weights).sum()), weight + float(weights.sum())
    return total / weight


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
)
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_transformer_engine_trains_along_our_own_layers(model: str, tmp_path: Path) -> None:
    """bf16 with each implementation: the same model to rounding, and checkpoints that either can load."""
    local, other = (
        cuda_run(tmp_path, impl, model, model=HALF, kernels={"transformer_impl": impl})
        for impl in ("local", "transformer_engine")
    )
    train_at_once(local, other)
    assert "local layers" not in (other / "log.0").read_text()
    losses, expected = ([loss for _, loss, _ in curve(run)] for run in (other, local))
    assert losses == pytest.approx(expected, rel=2e-2)
    crossed = cuda_run(
        tmp_path,
        "crossed",
        model,
        model=HALF,
        kernels={"transformer_impl": "local"},
        checkpoint={"load": str(tmp_path / "transformer_engine"), "finetune": True},
    )
    train_in_processes(crossed)
    assert evaluations(crossed)[0][1] == pytest.approx(evaluations(tmp_path / "transformer_engine")[-1][1], rel=1e-2)
