"""Steps that look wrong in whole runs: they end the run before it saves, or are left out, at every layout alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_run


def spoiled(run_dir: str, what: str, line: int, stop_after: int | None = None) -> str:
    """The error of a rank; the sample of that line of train.jsonl spoils the loss it is in, or its gradient alone."""
    import torch

    from megabatch.errors import MegabatchError
    from megabatch.trainer.objectives.objective import Mean, Terms
    from megabatch.trainer.objectives.sft import Sft

    real = Sft.terms

    def terms(objective: Sft, out: Any, pack: Any) -> Terms:
        found = real(objective, out, pack)
        if not torch.is_grad_enabled() or line not in pack.columns["number"].tolist():
            return found
        if what == "gradient":  # 0, with a slope of 0 * inf
            return Terms(found.numerator + (0 * found.numerator).sqrt(), found.weight, found.metrics)
        loss = found.metrics["loss"]
        factor = torch.nan if what == "loss" else 1e3
        return Terms(found.numerator * factor, found.weight, {"loss": Mean(loss.total * factor, loss.count)})

    Sft.terms = terms  # type: ignore[method-assign]
    try:
        train(run_dir, stop_after)
    except MegabatchError as e:
        return str(e)
    return ""


def made(folder: Path, name: str, **groups: dict[str, Any]) -> Path:
    groups = {
        "batch": {"micro_batch_size": 1, "global_batch_size": 2},
        "data": {"dataset_shuffle": False, "train_dataloader_shuffle": False},
    } | groups
    return write_run(recipe(folder, "qwen3", **groups), folder / name)


@pytest.mark.parametrize(("what", "clip_grad"), [("loss", 1.0), ("gradient", 1.0), ("gradient", 0.0)])
def test_the_run_ends_before_it_saves(what: str, clip_grad: float, ranks: RankServer, tmp_path: Path) -> None:
    run = made(
        tmp_path,
        "run",
        optimizer={"clip_grad": clip_grad},
        checkpoint={"save_interval": 1},
        resources={"tasks_per_node": 2},
    )
    for error in ranks.run(spoiled, world_size=2, run_dir=str(run), what=what, line=6):
        assert error.removeprefix("rank 0 failed: ").startswith("step 3: ") and "nan" in error
        assert f"{tmp_path}/train.jsonl:6 (rank " in error
        assert (f"{tmp_path}/train.jsonl:5 (rank " in error) == (what == "gradient"), "which alone may be any sample's"
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000001", "step_00000002"]
    assert [line["step"] for line in metrics(run)] == [1, 2]
    [incident] = map(json.loads, (run / "incidents.jsonl").read_text().splitlines())
    assert (incident["step"], incident["action"]) == (3, "stop")


SKIP = {"check_for_nan_in_loss_and_grad": "skip"}


@pytest.mark.parametrize("line", [6, 1], ids=["a step amid others", "the first step"])
def test_a_skipped_step_changes_nothing_and_is_exact_under_resume(
    line: int, ranks: RankServer, tmp_path: Path
) -> None:
    layout: dict[str, dict[str, Any]] = {
        "watching": SKIP,
        "training": {"train_iters": 6},
        "checkpoint": {"save_interval": 1},
    }
    whole = made(tmp_path, "whole", **layout)
    assert ranks.run(spoiled, world_size=1, run_dir=str(whole), what="loss", line=line) == [""]
    bad = (line + 1) // 2
    lines = metrics(whole)
    assert [m["skipped_steps"] for m in lines] == [int(m["step"] >= bad) for m in lines]
    assert math.isnan(lines[bad - 1]["loss"]) and all(math.isfinite(m["loss"]) for m in lines if m["step"] != bad)
    again = made(tmp_path, "again", **layout)
    ranks.run(spoiled, world_size=1, run_dir=str(again), what="loss", line=line, stop_after=bad)
    ranks.run(spoiled, world_size=1, run_dir=str(again), what="loss", line=line, stop_after=2)
    ranks.run(spoiled, world_size=1, run_dir=str(again), what="loss", line=line)
    assert repr(curve(again)) == repr(curve(whole))
    assert metrics(again)[-1]["skipped_steps"] == 1


def test_layouts_skip_the_same_steps(ranks: RankServer, tmp_path: Path) -> None:
    found = {}
    for name, world, parallel in (
        ("alone", 1, {}),
        ("overlapped", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        ("split", 2, {"tensor_model_parallel_size": 2}),
        ("cut", 2, {"context_parallel_size": 2}),
        ("staged", 2, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": False}),
    ):
        run = made(tmp_path, name, watching=SKIP, parallel=parallel, resources={"tasks_per_node": world})
        ranks.run(spoiled, world_size=world, run_dir=str(run), what="loss", line=3)
        found[name] = [(m["skipped_steps"], m["loss"], m["grad_norm"]) for m in metrics(run)]
        [incident] = map(json.loads, (run / "incidents.jsonl").read_text().splitlines())
        assert [one["samples"] for one in incident["suspects"]] == [[f"{tmp_path}/train.jsonl:3"]]
    assert [skipped for skipped, *_ in found["alone"]] == [0, 1, 1, 1]
    for name, steps in found.items():
        assert steps == [pytest.approx(step, rel=1e-5, nan_ok=True) for step in found["alone"]], name


def test_a_spike_is_skipped_and_the_window_survives_a_resume(ranks: RankServer, tmp_path: Path) -> None:
    layout: dict[str, dict[str, Any]] = {
        "training": {"train_iters": 8},
        "watching": {"check_for_spiky_loss": "skip", "spiky_loss_window": 4, "spiky_loss_sigma": 20.0},
    }
    whole, again = made(tmp_path, "whole", **layout), made(tmp_path, "again", **layout)
    ranks.run(spoiled, world_size=1, run_dir=str(whole), what="spike", line=13)
    assert [m["skipped_steps"] for m in metrics(whole)] == [0] * 6 + [1, 1]
    ranks.run(spoiled, world_size=1, run_dir=str(again), what="spike", line=13, stop_after=6)
    ranks.run(spoiled, world_size=1, run_dir=str(again), what="spike", line=13)
    assert curve(again) == curve(whole)


def test_a_warning_takes_the_update_all_the_same(ranks: RankServer, tmp_path: Path) -> None:
    run = made(tmp_path, "run", watching={"check_for_nan_in_loss_and_grad": "warn"})
    assert ranks.run(spoiled, world_size=1, run_dir=str(run), what="loss", line=6) == [""]
    assert [math.isnan(m["loss"]) for m in metrics(run)] == [False, False, True, True], "the weights are spoiled"
