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
from cuda_runs import cuda_run, python_path, require_gpus, train_at_once, train_in_processes
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


def made(folder: Path, name: str, kind: str, impl: str, /, **groups: Any) -> Path:
    return cuda_run(folder, name, kind, kernels={"transformer_impl": impl}, **groups)


def uses_local_layers(run: Path) -> bool:
    return "local layers" in (run / "log.0").read_text()


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
    local, other = (made(tmp_path, impl, model, impl, **groups) for impl in ("local", "transformer_engine"))
    train_at_once(local, other)
    assert not uses_local_layers(other)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(other), curve(local), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=2e-2), pytest.approx(its_norm, rel=5e-2)), f"step {step}"
    losses = [loss for _, loss in evaluations(other)]
    assert losses[-1] < losses[0] - 0.02
    load = {**LORA, "adapter_load": str(other / "checkpoints" / "step_00000004")}
    crossed = made(tmp_path, "crossed", model, "local", **{**groups, "tuner": load, "checkpoint": {"finetune": True}})
    train_in_processes(crossed)
    assert evaluations(crossed)[0][1] == pytest.approx(losses[-1], rel=1e-2)


@pytest.mark.parametrize("how", ["p2p", "a2a"])
def test_context_parallel_losses_are_those_of_one_process(how: str, tmp_path: Path) -> None:
    require_gpus(2)
    alone = made(tmp_path, "alone", "qwen3", "transformer_engine", model=HALF)
    parallel = {"context_parallel_size": 2, "cp_comm_type": how}
    split = made(tmp_path, how, "qwen3", "transformer_engine", world_size=2, model=HALF, parallel=parallel)
    train_in_processes(alone)
    train_in_processes(split, world_size=2)
    assert not uses_local_layers(split)
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(split), curve(alone), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-2), pytest.approx(its_norm, rel=5e-2)), f"step {step}"


def test_a_sliding_window_is_that_of_local_layers(tmp_path: Path) -> None:
    model = {**HALF, "window_size": "7,0"}
    local, other = (made(tmp_path, impl, "qwen2", impl, model=model) for impl in ("local", "transformer_engine"))
    whole = made(tmp_path, "whole", "qwen2", "local", model=HALF)
    train_at_once(local, other, whole)
    assert not uses_local_layers(other)
    for (step, loss, _), (_, expected, _) in zip(curve(other), curve(local), strict=True):
        assert loss == pytest.approx(expected, rel=1e-2), f"step {step}"
    assert curve(whole)[0][2] != pytest.approx(curve(other)[0][2], rel=1e-2), "the window is seen"
