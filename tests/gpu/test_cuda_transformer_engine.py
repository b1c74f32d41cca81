"""Transformer Engine's layers train what megatron-core's local ones do: adapters, windows, context parallelism."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda_runs import cuda_run, python_path, require_gpus, train_in_processes
from runs import curve, evaluations

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
)

HALF: dict[str, Any] = {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32}
LORA: dict[str, Any] = {
    "tuner_type": "lora",
    "lora_rank": 8,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "target_modules": ["all-linear"],
}


def trained(folder: Path, name: str, model: str, impl: str, *, world_size: int = 1, **groups: dict[str, Any]) -> Path:
    """A run in processes of its own; one of Transformer Engine's layers says nothing of local ones."""
    run = cuda_run(folder, name, model, world_size=world_size, kernels={"transformer_impl": impl}, **groups)
    train_in_processes(run, world_size=world_size)
    assert "local layers" not in (run / "log.0").read_text() or impl == "local"
    return run


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_adapters_add_their_term_to_every_kind_of_layer(model: str, tmp_path: Path) -> None:
    tuner = {**LORA, "lora_alpha": 8}
    run = cuda_run(tmp_path, "run", model, model=HALF, tuner=tuner, kernels={"transformer_impl": "transformer_engine"})
    script = Path(__file__).with_name("adapter_errors.py")
    paths = [str(Path(__file__).parents[1] / "trainer"), python_path()["PYTHONPATH"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(script), str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # qkv, proj, fc1, fc2; of grouped experts fc1 and fc2 by torch's grouped product and by one product for each
    assert len(found) == (6 if model == "qwen3_moe" else 4), list(found)
    for layer, errors in found.items():
        assert errors.pop("without adapter") > 0.3, layer
        assert all(error < 2e-2 for error in errors.values()), (layer, errors)


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
def test_adapters_train_as_on_local_layers_and_load_there(model: str, tmp_path: Path) -> None:
    groups: dict[str, Any] = {"model": HALF, "tuner": LORA, "bridge": {"merge_lora": False}}
    runs = {impl: trained(tmp_path, impl, model, impl, **groups) for impl in ("local", "transformer_engine")}
    for (step, loss, norm), (_, its_loss, its_norm) in zip(*(curve(run) for run in runs.values()), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=2e-2), pytest.approx(its_norm, rel=5e-2)), f"step {step}"
    losses = [loss for _, loss in evaluations(runs["transformer_engine"])]
    assert losses[-1] < losses[0] - 0.02
    load = {**LORA, "adapter_load": str(runs["transformer_engine"] / "checkpoints" / "step_00000004")}
    crossed = trained(
        tmp_path, "crossed", model, "local", **{**groups, "tuner": load, "checkpoint": {"finetune": True}}
    )
    assert evaluations(crossed)[0][1] == pytest.approx(losses[-1], rel=1e-2)


@pytest.mark.parametrize("how", ["p2p", "a2a"])
def test_context_parallel_losses_are_those_of_one_process(how: str, tmp_path: Path) -> None:
    require_gpus(2)
    alone = trained(tmp_path, "alone", "qwen3", "transformer_engine", model=HALF)
    parallel = {"context_parallel_size": 2, "cp_comm_type": how}
    split = trained(tmp_path, how, "qwen3", "transformer_engine", world_size=2, model=HALF, parallel=parallel)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(split), curve(alone), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-2), pytest.approx(its_norm, rel=5e-2)), f"step {step}"


def test_a_sliding_window_is_that_of_local_layers(tmp_path: Path) -> None:
    model = {**HALF, "window_size": "7,0"}
    runs = [trained(tmp_path, impl, "qwen2", impl, model=model) for impl in ("local", "transformer_engine")]
    whole = trained(tmp_path, "whole", "qwen2", "local", model=HALF)
    for (step, loss, _), (_, expected, _) in zip(*map(curve, runs), strict=True):
        assert loss == pytest.approx(expected, rel=1e-2), f"step {step}"
    assert curve(whole)[0][2] != pytest.approx(curve(runs[1])[0][2], rel=1e-2), "the window is seen"
