"""What a run draws from its data: whole epochs, the same samples as before, ids that the model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_dataset, write_run

from megabatch.run_directory import ExitCode


def train_or_refuse(run_dir: str, stop_after: int | None = None) -> tuple[int, str]:
    """Exit code of a rank, and what it was refused for."""
    from megabatch.errors import MegabatchError
    from megabatch.trainer import failures

    try:
        return train(run_dir, stop_after), ""
    except MegabatchError as error:
        return int(failures.report(error)), str(error)


def test_epochs_run_on_over_their_ends_and_resume_in_the_middle(ranks: RankServer, tmp_path: Path) -> None:
    """10 samples in batches of 4 for 3 epochs: 30 // 4 = 7 steps; the 3rd holds the last 2 of the first epoch."""
    write_dataset(tmp_path / "train.jsonl", samples=10)
    write_dataset(tmp_path / "validation.jsonl", samples=2)
    groups: dict[str, Any] = {"training": {"train_iters": None, "max_epochs": 3}, "batch": {"global_batch_size": 4}}
    whole = write_run(recipe(tmp_path, "qwen3", **groups), tmp_path / "whole")
    assert ranks.run(train, world_size=1, run_dir=str(whole)) == [ExitCode.DONE]
    assert [(line["step"], line["epoch"]) for line in metrics(whole)] == [
        (step, pytest.approx(step * 4 / 10)) for step in range(1, 8)
    ]
    cut = write_run(recipe(tmp_path, "qwen3", **groups), tmp_path / "cut")
    assert ranks.run(train, world_size=1, run_dir=str(cut), stop_after=3) == [ExitCode.REQUEUE]
    assert ranks.run(train, world_size=1, run_dir=str(cut)) == [ExitCode.DONE]
    assert curve(cut) == curve(whole)


def test_a_dataset_edited_at_equal_lengths_is_not_resumed(ranks: RankServer, tmp_path: Path) -> None:
    run = write_run(recipe(tmp_path, "qwen3"), tmp_path / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [ExitCode.REQUEUE]
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text().replace("It is", "is It"))
    [(code, error)] = ranks.run(train_or_refuse, world_size=1, run_dir=str(run))
    assert (code, len(metrics(run))) == (ExitCode.CONFIG, 2)
    assert "every sample has the same length" in error or "belongs to other samples" in error
    trainer = run / "checkpoints" / "step_00000002" / "trainer.json"
    saved = json.loads(trainer.read_text())
    assert saved["cursor"]["data"].count(":") == 1
