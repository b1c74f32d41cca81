"""The losses of every layout on GPUs are those of one process on the CPU; half precision stays near them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_runs import cpu_run, cuda_run, train
from runs import MODELS, curve, evaluations
from test_layouts import CASES, DENSE, EXPERTS

LAYOUTS = {"single": (1, {}), **DENSE, **EXPERTS}
HALF: dict[str, dict[str, Any]] = {"model": {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32}}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    runs = {model: cpu_run(folder, model, model) for model in MODELS}
    for run in runs.values():
        train(run)
    return runs


@pytest.mark.parametrize(("model", "layout"), [*((model, "single") for model in MODELS), *CASES])
def test_fp32_losses_are_those_of_the_cpu(model: str, layout: str, references: dict[str, Path]) -> None:
    world_size, groups = LAYOUTS[layout]
    _require_gpus(world_size)
    run = cuda_run(references[model].parent, f"{model}-{layout}", model, world_size=world_size, **groups)
    train(run, world_size=world_size)
    found, expected = curve(run), curve(references[model])
    assert len(found) == len(expected) == 4
    for (step, loss, norm), (_, reference_loss, reference_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(reference_loss, rel=1e-4), f"step {step}"
        assert norm == pytest.approx(reference_norm, rel=1e-3), f"step {step}"


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_trains_along_the_fp32_curve(model: str, tmp_path: Path) -> None:
    """Short runs with flash attention: the first losses agree to bf16's precision, and training learns."""
    full = {"model": {**HALF["model"], "torch_dtype": "float32"}, "training": {"train_iters": 8}}
    half = {**HALF, "training": {"train_iters": 8}}
    exact, rounded = cuda_run(tmp_path, "fp32", model, **full), cuda_run(tmp_path, "bf16", model, **half)
    train(exact)
    train(rounded)
    for (step, loss, _), (_, expected, _) in zip(curve(rounded), curve(exact), strict=True):
        assert loss == pytest.approx(expected, rel=3e-2), f"step {step}"
    first, *_, last = [loss for _, loss in evaluations(rounded)]
    assert last < first - 0.1


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp", "pp2_vpp2", "tp2_sp_pp2"])
def test_bfloat16_layouts_agree(layout: str, tmp_path: Path) -> None:
    world_size, groups = LAYOUTS[layout]
    _require_gpus(world_size)
    single = cuda_run(tmp_path, "single", "qwen3", **HALF)
    split = cuda_run(tmp_path, "split", "qwen3", world_size=world_size, **HALF, **groups)
    train(single)
    train(split, world_size=world_size)
    for (step, loss, _), (_, expected, _) in zip(curve(split), curve(single), strict=True):
        assert loss == pytest.approx(expected, rel=1e-2), f"step {step}"


def _require_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, there is {torch.cuda.device_count()}")
