"""Who may write to a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rank_server import RankServer
from runs import recipe, train, write_run

from megabatch.run_directory import RunDirectory
from megabatch.trainer.checkpoints import commit


def train_or_say(run_dir: str, stop_after: int) -> str:
    from megabatch.errors import CheckpointError

    try:
        return str(train(run_dir, stop_after))
    except CheckpointError as e:
        return str(e)


def test_an_attempt_that_was_given_up_saves_nothing(ranks: RankServer, tmp_path: Path) -> None:
    """Slurm may start a job anew while ranks of a node that it took for dead live on."""
    run = write_run(recipe(tmp_path), tmp_path / "run")
    (run / "jobs.jsonl").write_text(
        '{"job_id": "7", "attempt": 0, "start": 1}\n{"job_id": "7", "attempt": 1, "start": 2}\n'
    )
    [said] = ranks.run(train_or_say, world_size=1, run_dir=str(run), stop_after=1)
    assert said == "attempt 1 has taken over this run; attempt 0 ends"
    assert not list((run / "checkpoints").glob("*"))


def test_a_kill_while_one_is_deleted_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        (run.step(step) / "mcore").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    commit.forget(run, 3, commit.Retention(save_total_limit=2))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        ".step_00000001.tmp",  # which the next attempt deletes
        "step_00000002",
        "step_00000003",
    ]


def test_a_resume_points_to_the_best_that_a_kill_forgot(ranks: RankServer, tmp_path: Path) -> None:
    checkpoint = {"save_interval": 2, "metric_for_best_model": "loss"}
    run = write_run(recipe(tmp_path, model={"num_layers": 1}, checkpoint=checkpoint), tmp_path / "run")
    ranks.run(train, world_size=1, run_dir=str(run))
    best = run / "checkpoints" / "best"
    assert best.read_text() == "step_00000004\n"
    best.write_text("step_00000002\n")  # as between `latest` and `best` of the last checkpoint
    ranks.run(train, world_size=1, run_dir=str(run))
    assert best.read_text() == "step_00000004\n"
