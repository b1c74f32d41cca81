"""fp16 with a dynamic loss scale: fp32's curve within rounding, overflows skipped and counted, exact resume."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, metrics, recipe, train, write_run

from megabatch.run_directory import ExitCode

HALF = {"torch_dtype": "float16"}
CALM = {"initial_loss_scale": 2.0**12}
UNSEEN = {"eval_iters": 0}
"""No evaluation, in runs that ask about training alone."""


def _make(folder: Path, name: str, family: str = "qwen3", /, **groups: dict[str, Any]) -> Path:
    return write_run(recipe(folder, family, **groups), folder / name)


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_loss_and_gradient_norm_are_those_of_fp32(model: str, ranks: RankServer, tmp_path: Path) -> None:
    exact = _make(tmp_path, "fp32", model)
    half = _make(tmp_path, "fp16", model, model=HALF, precision=CALM)
    for run in (exact, half):
        assert ranks.run(train, world_size=1, run_dir=str(run)) == [ExitCode.DONE]
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(curve(half), curve(exact), strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-3), step
        assert norm == pytest.approx(expected_norm, rel=2e-2), step
    assert evaluations(half) != evaluations(exact), "otherwise nothing was computed in fp16"
    assert [(m["loss_scale"], m["skipped_steps"]) for m in metrics(half)] == [(2.0**12, 0)] * 4


def test_an_overflow_changes_no_parameter_and_is_counted(ranks: RankServer, tmp_path: Path) -> None:
    groups: dict[str, Any] = {
        "model": HALF,
        "training": {"train_iters": 24},
        "evaluation": UNSEEN,
        "logging": {"log_params_norm": True},
        "precision": {"initial_loss_scale": 2.0**36, "hysteresis": 1},
        "batch": {"micro_batch_size": 1, "global_batch_size": 2},
    }
    run = _make(tmp_path, "run", **groups)
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [ExitCode.DONE]
    lines = metrics(run)
    skipped = [m for m in lines if m["grad_norm"] is None]
    assert 5 < len(skipped) < 24
    assert lines[-1]["skipped_steps"] == len(skipped)
    norms = [m["params_norm"] for m in lines]
    for before, m in pairwise(lines):
        same = m["params_norm"] == before["params_norm"]
        assert same == (m["grad_norm"] is None), m["step"]
        assert m["loss_scale"] == before["loss_scale"] / (2 if m["grad_norm"] is None else 1)
    assert len(set(norms)) == 1 + 24 - len(skipped)
    first = next(m for m in lines if m["grad_norm"] is not None)
    assert lines[first["step"]]["learning_rate"] < first["learning_rate"] == lines[0]["learning_rate"]


def test_an_overflow_at_the_smallest_scale_ends_the_run(ranks: RankServer, tmp_path: Path) -> None:
    run = _make(tmp_path, "run", model=HALF, precision={"initial_loss_scale": 2.0**40, "min_loss_scale": 2.0**40})
    assert "overflow fp16 at the smallest loss scale" in ranks.run(_error, world_size=1, run_dir=str(run))[0]


def _error(run_dir: str) -> str:
    from megabatch.errors import MegabatchError

    try:
        train(run_dir)
    except MegabatchError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ({"use_distributed_optimizer": True}, 2),
        ({"use_distributed_optimizer": False}, 1),
        ({"expert_model_parallel_size": 2}, 2),
        ({"pipeline_model_parallel_size": 2}, 2),
    ],
)
def test_resume_goes_on_with_scale_and_count(
    layout: dict[str, Any], world_size: int, ranks: RankServer, tmp_path: Path
) -> None:
    groups: dict[str, Any] = {
        "model": {**HALF, "num_layers": 2},
        "evaluation": UNSEEN,
        "precision": {"initial_loss_scale": 2.0**24, "hysteresis": 2, "loss_scale_window": 2},
        "training": {"train_iters": 16},
        "parallel": layout,
        "batch": {"micro_batch_size": 1, "global_batch_size": 2},
        "resources": {"tasks_per_node": world_size},
    }
    runs = [_make(tmp_path, name, "qwen3_moe", **groups) for name in ("whole", "cut")]
    ranks.run(train, world_size=world_size, run_dir=str(runs[0]))
    stopped = ranks.run(train, world_size=world_size, run_dir=str(runs[1]), stop_after=12)
    assert set(stopped) == {ExitCode.REQUEUE}
    saved = json.loads((runs[1] / "checkpoints" / "step_00000012" / "trainer.json").read_text())
    assert 0 < saved["skipped"] < 12 and set(saved["loss_scale"]) == {"scale", "growth_tracker", "hysteresis_tracker"}
    ranks.run(train, world_size=world_size, run_dir=str(runs[1]))
    shown = ("loss", "grad_norm", "learning_rate", "loss_scale", "skipped_steps")
    whole, cut = ([[m[name] for name in shown] for m in metrics(run)] for run in runs)
    assert cut == whole
    assert any(m["grad_norm"] is not None for m in metrics(runs[0])[12:])


def test_a_run_is_cut_before_its_first_update(ranks: RankServer, tmp_path: Path) -> None:
    groups: dict[str, Any] = {
        "model": HALF,
        "evaluation": UNSEEN,
        "precision": {"initial_loss_scale": 2.0**34, "hysteresis": 1},
        "training": {"train_iters": 24},
        "batch": {"micro_batch_size": 1, "global_batch_size": 1},
    }
    whole, cut = (_make(tmp_path, name, **groups) for name in ("whole", "cut"))
    ranks.run(train, world_size=1, run_dir=str(whole))
    assert ranks.run(train, world_size=1, run_dir=str(cut), stop_after=2) == [ExitCode.REQUEUE]
    ranks.run(train, world_size=1, run_dir=str(cut))
    assert curve(cut) == curve(whole) and curve(whole)[1][2] is None and curve(whole)[-1][2] is not None


def test_the_optimizers_of_a_mixture_of_experts_share_one_scale(ranks: RankServer, tmp_path: Path) -> None:
    run = _make(tmp_path, "run", "qwen3_moe", model=HALF, precision=CALM, resources={"tasks_per_node": 2},
                parallel={"expert_model_parallel_size": 2})  # fmt: skip
    for scales in ranks.run(_scales_after_overflow_in_experts, world_size=2, run_dir=str(run)):
        assert scales == [[2.0**11] * 2, [2.0**10] * 2]


def _scales_after_overflow_in_experts(run_dir: str) -> list[list[float]]:
    """The scale that each optimizer undoes, before and after experts' gradients alone overflow on one rank."""
    import torch.distributed as dist

    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        engine = assemble.build_engine(run, ranks, train_iters=4)
        optimizer = engine.optimizer
        assert optimizer is not None
        found = []
        for _ in range(3):
            for chunk in engine.model.wrapped:
                chunk.zero_grad_buffer()
                for name, parameter in chunk.named_parameters():
                    parameter.main_grad.fill_(1.0)
                    if ".experts." in name and dist.get_rank() == 1:
                        parameter.main_grad.fill_(float("inf"))
            assert optimizer.gradient_norm() is None
            found.append([float(1 / inner.grad_scaler.inv_scale) for inner in optimizer.inner])
        return found[1:]
