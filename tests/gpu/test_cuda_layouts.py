"""The losses of every layout on GPUs are those of one process on the CPU; half precision stays near them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cuda_runs import cpu_run, cuda_run, require_gpus, train_on
from rank_server import RankServer
from runs import MODELS, curve, evaluations
from test_layouts import CASES, DENSE, EXPERTS

LAYOUTS = {"single": (1, {}), **DENSE, **EXPERTS}
HALF: dict[str, dict[str, Any]] = {"model": {"torch_dtype": "bfloat16", "hidden_size": 128, "kv_channels": 32}}


@pytest.fixture(scope="module")
def reference(cpus: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("layouts")
    return cache(lambda model: train_on(cpus, cpu_run(folder, model, model)))


@pytest.mark.parametrize(("model", "layout"), [*((model, "single") for model in MODELS), *CASES])
def test_fp32_losses_are_those_of_the_cpu(
    model: str, layout: str, gpus: RankServer, reference: Callable[[str], Path]
) -> None:
    world_size, groups = LAYOUTS[layout]
    require_gpus(world_size)
    folder = reference(model).parent
    run = cuda_run(folder, f"{model}-{layout}", model, world_size=world_size, **groups)
    train_on(gpus, run, world_size=world_size)
    found, expected = curve(run), curve(reference(model))
    assert len(found) == len(expected) == 4
    for (step, loss, norm), (_, reference_loss, reference_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(reference_loss, rel=1e-4), f"step {step}"
        assert norm == pytest.approx(reference_norm, rel=1e-3), f"step {step}"


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_trains_along_the_fp32_curve(model: str, gpus: RankServer, tmp_path: Path) -> None:
    """Short runs with flash attention: the first losses agree to bf16's precision, and training learns."""
    full = {"model": {**HALF["model"], "torch_dtype": "float32"}, "training": {"train_iters": 8}}
    half = {**HALF, "training": {"train_iters": 8}}
    exact, rounded = cuda_run(tmp_path, "fp32", model, **full), cuda_run(tmp_path, "bf16", model, **half)
    train_on(gpus, exact)
    train_on(gpus, rounded)
    for (step, loss, _), (_, expected, _) in zip(curve(rounded), curve(exact), strict=True):
        assert loss == pytest.approx(expected, rel=3e-2), f"step {step}"
    first, *_, last = [loss for _, loss in evaluations(rounded)]
    assert last < first - 0.1


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp", "pp2_vpp2", "tp2_sp_pp2"])
def test_bfloat16_layouts_agree(layout: str, gpus: RankServer, tmp_path: Path) -> None:
    world_size, groups = LAYOUTS[layout]
    require_gpus(world_size)
    single = cuda_run(tmp_path, "single", "qwen3", **HALF)
    split = cuda_run(tmp_path, "split", "qwen3", world_size=world_size, **HALF, **groups)
    train_on(gpus, single)
    train_on(gpus, split, world_size=world_size)
    for (step, loss, _), (_, expected, _) in zip(curve(split), curve(single), strict=True):
        assert loss == pytest.approx(expected, rel=1e-2), f"step {step}"
