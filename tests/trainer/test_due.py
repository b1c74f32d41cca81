"""When a run evaluates and saves, what it keeps, and which checkpoint it calls its best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_dataset, write_run

from megabatch.config.checkpoint import Checkpoint
from megabatch.errors import ConfigError
from megabatch.run_directory import ExitCode
from megabatch.trainer.due import Best, ended_epoch
from megabatch.trainer.sums import Ratio

EPOCHS: dict[str, Any] = {
    "training": {"train_iters": None, "max_epochs": 4},
    "batch": {"global_batch_size": 4},
    "evaluation": {"eval_interval": None, "eval_on_start": False},
}


def _make(folder: Path, name: str, checkpoint: dict[str, Any], **groups: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    if not (folder / "train.jsonl").exists():
        write_dataset(folder / "train.jsonl", samples=10)
        write_dataset(folder / "validation.jsonl", samples=7, seed=1)
    made = recipe(
        folder,
        "qwen3",
        checkpoint={"save_strategy": "epoch", "save_interval": 1, **checkpoint},
        **{**EPOCHS, **groups},
    )
    return write_run(made, folder / name)


def _steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((run / "checkpoints").glob("step_*"))]


def test_each_epoch_ends_with_an_evaluation_and_a_checkpoint(ranks: RankServer, tmp_path: Path) -> None:
    """10 samples in batches of 4: epochs end within steps 3, 5, 8 and at 10."""
    run = _make(tmp_path, "run", {"save_safetensors_interval": 2})
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [ExitCode.DONE]
    assert _steps(run) == [3, 5, 8, 10]
    assert [m["step"] for m in metrics(run, "eval")] == [3, 5, 8, 10]
    with_hf = [path.parent.name for path in sorted((run / "checkpoints").glob("step_*/hf"))]
    assert with_hf == ["step_00000005", "step_00000010"], "of every second epoch"


def test_epochs_are_retained_by_their_number_after_a_resume_too(ranks: RankServer, tmp_path: Path) -> None:
    run = _make(tmp_path, "run", {"save_retain_interval": 2})
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=7) == [ExitCode.REQUEUE]
    assert _steps(run) == [5, 7], "where it stopped is no end of an epoch"
    ranks.run(train, world_size=1, run_dir=str(run))
    assert _steps(run) == [5, 10]


def test_the_best_checkpoint_is_named_and_kept(ranks: RankServer, tmp_path: Path) -> None:
    """At a learning rate that is far too high the loss rises again."""
    groups: dict[str, Any] = {
        "training": {"train_iters": 8},
        "batch": {"global_batch_size": 4},
        "learning_rate": {"lr": 0.05, "lr_decay_style": "constant"},
        "evaluation": {"eval_interval": 1, "eval_on_start": False},
    }
    best = {"save_strategy": "steps", "metric_for_best_model": "eval_loss", "save_total_limit": 2}
    run = _make(tmp_path, "run", best, **groups)
    ranks.run(train, world_size=1, run_dir=str(run), stop_after=6)
    ranks.run(train, world_size=1, run_dir=str(run))
    losses = {m["step"]: m["eval_loss"] for m in metrics(run, "eval")}
    step = min(losses, key=losses.__getitem__)
    assert (run / "checkpoints" / "best").read_text() == f"step_{step:08d}\n"
    assert _steps(run) == sorted({step, 7 if step == 8 else 8, 8})
    saved = json.loads((run / "checkpoints" / "step_00000008" / "trainer.json").read_text())
    assert saved["best"] == {"step": step, "value": losses[step]}


def test_the_direction_follows_the_metrics_name() -> None:
    lowest = [(name, None, 2) for name in ("loss", "eval_loss", "perplexity", "eval_mse", "kl", "ece", "nll_loss")]
    for name, greater, expected in (*lowest, ("reward", None, 3), ("loss", True, 3), ("perplexity", True, 3)):
        best = Best(Checkpoint(metric_for_best_model=name, greater_is_better=greater), None)
        for step, value in ((1, 2.0), (2, 1.0), (3, 4.0), (4, 4.0)):
            best.see(step, {name.removeprefix("eval_"): Ratio(value, 1.0)})
        assert best.state is not None and best.state["step"] == expected


def test_an_unknown_metric_is_an_error_that_names_those_there_are() -> None:
    best = Best(Checkpoint(metric_for_best_model="accuracy"), None)
    with pytest.raises(ConfigError, match="accuracy is no metric of this run's evaluation; there are loss"):
        best.see(1, {"loss": Ratio(1.0, 1.0)})


def test_epochs_end_where_their_number_changes() -> None:
    assert [ended_epoch(*pair) for pair in ((0.0, 0.4), (0.8, 1.2), (0.8, 1.0), (1.0, 1.4))] == [0, 1, 1, 0]


def test_an_evaluation_without_a_value_is_never_the_best() -> None:
    best = Best(Checkpoint(metric_for_best_model="auc"), None)
    best.see(1, {"auc": Ratio(0.0, 0.0)})
    assert best.state is None
    for step, value in ((2, 0.5), (3, float("nan")), (4, 0.7)):
        best.see(step, {"auc": Ratio(value, 1.0)})
    assert best.state == {"step": 4, "value": 0.7}
    resumed = Best(Checkpoint(metric_for_best_model="auc"), {"step": 1, "value": float("nan")})
    resumed.see(2, {"auc": Ratio(0.1, 1.0)})
    assert resumed.state == {"step": 2, "value": 0.1}, "as older checkpoints may have it"
