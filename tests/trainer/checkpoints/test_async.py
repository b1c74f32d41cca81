"""Checkpoints that are written beside training: the same files, committed between steps, or nothing at all."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, recipe, train, write_run

from megabatch.run_directory import ExitCode
from megabatch.saved.manifest import MANIFEST, read_manifest

GROUPS: dict[str, Any] = {
    "training": {"train_iters": 6},
    "checkpoint": {"save_interval": 2, "async_save": True},
    "evaluation": {"eval_interval": 6},
}


def train_with_slow_writer(run_dir: str, stop_after: int | None = None, killed_at: int | None = None) -> int:
    """Trains one rank whose writer begins once another step is done: what it wrote then was copied, or is wrong.

    Args: killed_at: the step at whose end the process dies, with the writer yet to begin.
    """
    import os
    import signal

    from megabatch.trainer.checkpoints.background import Background
    from megabatch.trainer.checkpoints.checkpoints import Checkpoints
    from megabatch.trainer.engine import Engine

    taken, waits = 0, threading.Condition()
    release = False
    run, finish, step = Background._run, Checkpoints.finish, Engine.step

    def late(self: Any) -> None:
        with waits:
            begun = taken
            waits.wait_for(lambda: (taken > begun and killed_at is None) or release)
        run(self)

    def finishing(self: Any) -> Any:
        nonlocal release
        with waits:
            release = True
            waits.notify_all()
        try:
            return finish(self)
        finally:
            release = False

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal taken
        result = step(self, *arguments, **keywords)
        with waits:
            taken += 1
            waits.notify_all()
        if taken == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Background._run, Checkpoints.finish, Engine.step = late, finishing, counted  # type: ignore[method-assign]
    return train(run_dir, stop_after)


def train_with_faulty_writer(run_dir: str, faulty: int) -> str:
    """What a rank is told when the writer of one of them finds no room."""
    import errno
    import os

    from megabatch.errors import MegabatchError
    from megabatch.trainer.checkpoints import writing

    write = writing.write_items

    def full(found: Any, directory: Path, *, rank: int) -> Any:
        if rank == faulty and "step_00000004" in str(directory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(found, directory, rank=rank)

    writing.write_items = full
    try:
        return str(train(run_dir))
    except MegabatchError as error:
        return str(error)


def _digests(checkpoint: Path) -> dict[str, Any]:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    return {name: file for name, file in manifest.files.items() if name != "trainer.json"}


def _checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "alone": ("qwen3", 1, {}),
    "dp2": ("qwen3_moe", 2, {}),
    "dp2_overlapped": ("qwen3", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2_plain_optimizer": ("qwen3", 2, {"use_distributed_optimizer": False}),
    "tp2_sp": ("qwen3", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_those_of_a_save_that_training_waits_for(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    model, world_size, parallel = LAYOUTS[layout]
    runs = {}
    for name, beside in (("beside", True), ("waiting", False)):
        groups = {**GROUPS, "checkpoint": {**GROUPS["checkpoint"], "async_save": beside}, "parallel": parallel}
        made = recipe(tmp_path, model, **groups, resources={"tasks_per_node": world_size})
        runs[name] = write_run(made, tmp_path / name)
        function = train_with_slow_writer if beside else train
        assert set(ranks.run(function, world_size=world_size, run_dir=str(runs[name]))) == {ExitCode.DONE}
    assert curve(runs["beside"]) == curve(runs["waiting"])
    assert _checkpoints(runs["beside"]) == ["step_00000002", "step_00000004", "step_00000006"]
    for name in _checkpoints(runs["beside"]):
        found, expected = (_digests(runs[which] / "checkpoints" / name) for which in ("beside", "waiting"))
        assert found == expected, name
    assert (runs["beside"] / "checkpoints" / "latest").read_text().strip() == "step_00000006"


def test_a_kill_loses_the_checkpoint_under_way_alone(ranks: RankServer, tmp_path: Path) -> None:
    whole = write_run(recipe(tmp_path, "qwen3", **GROUPS), tmp_path / "whole")
    assert ranks.run(train, world_size=1, run_dir=str(whole)) == [ExitCode.DONE]
    cut = write_run(recipe(tmp_path, "qwen3", **GROUPS), tmp_path / "cut")
    with pytest.raises(RuntimeError, match="killed"):
        ranks.run(train_with_slow_writer, world_size=1, run_dir=str(cut), killed_at=5)
    # step 4's save finished step 2's; its own was under way
    assert _checkpoints(cut) == [".step_00000004.tmp", "step_00000002"]
    assert ranks.run(train, world_size=1, run_dir=str(cut)) == [ExitCode.DONE]
    assert _checkpoints(cut) == ["step_00000002", "step_00000004", "step_00000006"]
    assert curve(cut)[-4:] == curve(whole)[-4:]
    last = [_digests(run / "checkpoints" / "step_00000006") for run in (cut, whole)]
    assert last[0] == last[1]


def test_a_stop_finishes_what_is_under_way_and_saves_where_it_is(ranks: RankServer, tmp_path: Path) -> None:
    run = write_run(recipe(tmp_path, "qwen3", **GROUPS), tmp_path / "run")
    assert ranks.run(train_with_slow_writer, world_size=1, run_dir=str(run), stop_after=3) == [ExitCode.REQUEUE]
    assert _checkpoints(run) == ["step_00000002", "step_00000003"]
    trainer = json.loads((run / "checkpoints" / "step_00000002" / "trainer.json").read_text())
    assert (trainer["step"], trainer["manifest"]) == (2, MANIFEST)


def test_an_error_of_one_writer_ends_the_run_on_every_rank(ranks: RankServer, tmp_path: Path) -> None:
    run = write_run(recipe(tmp_path, "qwen3", **GROUPS, resources={"tasks_per_node": 2}), tmp_path / "run")
    for error in ranks.run(train_with_faulty_writer, world_size=2, run_dir=str(run), faulty=1):
        assert "the checkpoint of step 4 was not saved" in error
        assert "No space left on device" in error
        assert "set checkpoint.save_total_limit" in error
    assert _checkpoints(run) == ["step_00000002"]
