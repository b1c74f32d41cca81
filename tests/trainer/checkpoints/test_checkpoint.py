"""Who may write to a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import recipe, train, write_run

from megabatch.run_directory import RunDirectory
from megabatch.saved import history
from megabatch.saved.manifest import File
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


def _committed(run: RunDirectory, step: int) -> Path:
    temporary = commit.temporary_of(run.step(step))
    commit.begin(temporary)
    (temporary / "mcore" / ".metadata").touch()
    commit.commit(run, temporary, run.step(step), {"mcore/.metadata": File.of(b"")}, texts={"trainer.json": "{}"})
    return run.step(step)


@pytest.mark.parametrize("killed_in", ["write_atomic", "replace", "rmtree"])
def test_a_kill_while_one_is_committed_leaves_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    """Before each move: the run resumes from the one before or the new one, and takes neither for abandoned."""
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    for step in (1, 2):
        _committed(run, step)
    history.go_back(run, "1")
    run.checkpoints.joinpath("later.step_00000002").rename(run.step(2))  # as by hand

    class Killed(BaseException):
        pass

    moved = {"write_atomic": run.latest, "replace": commit.temporary_of(run.step(2)), "rmtree": "later.step_00000002"}
    place: Any = {"write_atomic": commit, "replace": os, "rmtree": shutil}[killed_in]
    does = getattr(place, killed_in)

    def kill(path: Path, *rest: Any, **named: Any) -> None:
        if moved[killed_in] in (path, Path(path).name):
            raise Killed
        does(path, *rest, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, killed_in, kill)
        _committed(run, 2)
    found = history.candidates(run)
    assert (found.usable[0], found.later) == (run.step(2 if killed_in == "rmtree" else 1), ())
    assert _committed(run, 2) == history.named_by_latest(run)
    assert not list(run.checkpoints.glob("later.*"))


def test_a_resume_points_to_the_best_that_a_kill_forgot(ranks: RankServer, tmp_path: Path) -> None:
    checkpoint = {"save_interval": 2, "metric_for_best_model": "loss"}
    run = write_run(recipe(tmp_path, model={"num_layers": 1}, checkpoint=checkpoint), tmp_path / "run")
    ranks.run(train, world_size=1, run_dir=str(run))
    best = run / "checkpoints" / "best"
    assert best.read_text() == "step_00000004\n"
    best.write_text("step_00000002\n")  # as between `latest` and `best` of the last checkpoint
    ranks.run(train, world_size=1, run_dir=str(run))
    assert best.read_text() == "step_00000004\n"
