"""A sweep as a person runs it on a cluster: submitted, disturbed, submitted again, looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.run_directory import RunDirectory
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.state import status

from .conftest import RECIPES, Done, Run

pytestmark = pytest.mark.slurm
LAYOUTS = ["pipeline_model_parallel_size=1,2,4", "micro_batch_size=1,2,4", "expert_model_parallel_size=1,2"]
KEPT = [f"pp{pp}-ep{ep}-mbs{size}" for pp in (1, 2, 4) for size in (1, 2, 4) for ep in (1, 2) if (pp, ep) != (4, 2)]
VICTIMS = ["pp1-ep2-mbs1", "pp4-ep1-mbs4"]


@pytest.fixture
def submit(run: Run, slurm: PrivateCluster, tmp_path: Path) -> Callable[..., Done]:
    """The quickstart recipe's 18 layouts on four ranks, with a stand-in for the trainer."""
    python = tmp_path / "it's a $(touch pwned) python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stand_in.py")} "$@"\n')
    python.chmod(0o755)
    profile = tmp_path / "cluster.toml"
    profile.write_text(f"python = {json.dumps(str(python))}\n")
    flags = ["--cluster", str(profile), "--run_dir", str(tmp_path / "sweep"), "--tasks_per_node", "4"]
    flags += ["--num_layers", "4", "--requeue", "false"]

    def submit_(*more: str, sweep: Sequence[str] = LAYOUTS, code: int = 0) -> Done:
        arguments = ["--submit", "--sweep", *sweep, *flags, *more]
        return run(RECIPES / "quickstart.py", *arguments, slurm=slurm, code=code)

    return submit_


def _wait(sweep: Path, names: list[str], *states: State) -> None:
    deadline = time.monotonic() + 1200
    while left := [one for one in status([sweep / name for name in names], fresh_s=0) if one.state not in states]:
        assert time.monotonic() < deadline, {one.run.name: str(one.state) for one in left}
        time.sleep(0.1)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 1200
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.1)


def _jobs(sweep: Path) -> dict[str, list[str]]:
    """Ids of each run's jobs."""
    return {
        path.name: [record.job_id for record in read_records(RunDirectory(path))] for path in sorted(sweep.glob("pp*"))
    }


def test_a_sweep_goes_on_where_it_was_disturbed(
    submit: Callable[..., Done], slurm: PrivateCluster, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / ".slow").write_text(" ".join(VICTIMS))
    done = submit("--max_parallel", "8")
    assert "15 runs in 1 array of 15, at most 8 at a time, 4 ranks each; 3 pruned" in done.stdout
    (array_id,) = {job_id.split("_")[0] for (job_id,) in _jobs(sweep).values()}
    assert _jobs(sweep) == {name: [f"{array_id}_{index}"] for index, name in enumerate(KEPT)}

    others = [name for name in KEPT if name not in VICTIMS]
    _wait(sweep, others, State.COMPLETED)
    _wait(sweep, VICTIMS, State.RUNNING)
    active = submit()
    assert "nothing is missing or failed" in active.stdout
    assert f"running as job {array_id}_1" in active.stdout and _jobs(sweep)[VICTIMS[0]] == [f"{array_id}_1"]

    subprocess.run(["scancel", f"{array_id}_1"], check=True)
    os.kill(int((sweep / VICTIMS[1] / "pid.0").read_text()), signal.SIGKILL)
    _wait(sweep, VICTIMS[:1], State.CANCELLED)
    _wait(sweep, VICTIMS[1:], State.FAILED)

    before = {name: (sweep / name / "run.json").read_bytes() for name in KEPT}
    (sweep / ".slow").unlink()
    again = submit()
    assert "submitted job array" in again.stdout and ": 2 runs, from" in again.stdout
    assert again.stdout.count("left alone: ") == 13 and "left alone: pp1-ep1-mbs1, completed" in again.stdout
    _wait(sweep, KEPT, State.COMPLETED)
    (second,) = {job_id.split("_")[0] for name in VICTIMS for job_id in _jobs(sweep)[name][1:]}
    assert {name: ids[1:] for name, ids in _jobs(sweep).items() if ids[1:]} == {
        VICTIMS[0]: [f"{second}_0"],
        VICTIMS[1]: [f"{second}_1"],
    }
    assert before == {name: (sweep / name / "run.json").read_bytes() for name in KEPT}
    for index, name in enumerate(VICTIMS):
        batch = sweep / name / "logs" / f"batch.{second}_{index}.log"
        assert batch.exists() and (sweep / name / "logs" / "rank_0.1.log").exists()
    assert sorted(path.name for path in (sweep / "arrays").iterdir()) == ["0", "1"]
    assert not list(tmp_path.rglob("pwned"))


def test_runs_that_are_about_to_end_are_named(
    submit: Callable[..., Done], slurm: PrivateCluster, tmp_path: Path
) -> None:
    """What heartbeats say of them still, Slurm knows better, and so once they are gone."""
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / ".slow").write_text("seed1 seed2")
    (sweep / ".deaf").touch()
    submit(sweep=["seed=1,2,3"])
    _wait(sweep, ["seed3"], State.COMPLETED)
    for name in ("seed1", "seed2"):
        _wait_for(sweep / name / "heartbeat.json")
    [array_id] = {record.job_id.split("_")[0] for record in read_records(RunDirectory(sweep / "seed1"))}
    subprocess.run(["scancel", f"{array_id}_0"], check=True)
    assert main(["cancel", str(sweep / "seed2")]) == 0
    said = submit(sweep=["seed=1,2,3"]).stdout
    assert said.endswith(
        "nothing was submitted: nothing is missing or failed, but these have not ended\n"
        f"  seed1: running as job {array_id}_0 (ending)\n"
        f"  seed2: running as job {array_id}_1 (cancelled, still saving)\n"
        "once they have ended, the same command submits those that are not done\n"
    )
    _wait(sweep, ["seed1", "seed2"], State.CANCELLED)
    (sweep / ".slow").unlink()
    assert ": 2 runs, from" in submit(sweep=["seed=1,2,3"]).stdout
    _wait(sweep, ["seed1", "seed2"], State.COMPLETED)


def test_a_sweep_is_split_where_the_cluster_takes_no_more(
    submit: Callable[..., Done], slurm: PrivateCluster, tmp_path: Path
) -> None:
    """`MaxArraySize` as the controller says it, not as it is by default."""
    configuration = slurm.layout.configuration
    before = configuration.read_text()
    try:
        configuration.write_text(f"{before}MaxArraySize=6\n")
        subprocess.run(["scontrol", "reconfigure"], check=True)
        done = submit("--max_parallel", "7")
        # daemons that are reconfigured send away jobs that start in that moment
        _wait(tmp_path / "sweep", KEPT, State.COMPLETED)
    finally:
        configuration.write_text(before)
        subprocess.run(["scontrol", "reconfigure"], check=True)
    assert "15 runs in 3 arrays of 6 and 6 and 3, at most 7 at a time" in done.stdout
    ids = [job_id.split("_") for (job_id,) in _jobs(tmp_path / "sweep").values()]
    first, second, third = sorted({array for array, _ in ids}, key=int)
    assert sorted((array, int(index)) for array, index in ids) == sorted(
        [(first, i) for i in range(6)] + [(second, i) for i in range(6)] + [(third, i) for i in range(3)]
    )


def test_another_configuration_is_refused_and_nothing_is_queued(
    submit: Callable[..., Done], slurm: PrivateCluster, tmp_path: Path
) -> None:
    submit()
    before = _jobs(tmp_path / "sweep")
    refused = submit("--lr", "1e-3", code=2)
    assert "15 folders hold other runs, nothing was submitted" in refused.stderr
    assert "pp1-ep1-mbs1 holds another run: it differs in learning_rate.lr" in refused.stderr
    assert _jobs(tmp_path / "sweep") == before
    subprocess.run(["scancel", "--name=quickstart"], check=True)


def test_a_refused_submission_leaves_nothing(submit: Callable[..., Done], tmp_path: Path) -> None:
    refused = submit("--nodes", "99", "--global_batch_size", str(99 * 16), code=1)
    assert "sbatch refused the job, nothing was queued" in refused.stderr
    assert not (tmp_path / "sweep").exists()


def test_show_ranks_the_finished_ones(run: Run, slurm: PrivateCluster, tmp_path: Path, submit: object) -> None:
    sweep = tmp_path / "shown"
    sweep.mkdir()
    (sweep / ".slow").write_text("lr0.002-seed2")
    flags = ["--cluster", str(tmp_path / "cluster.toml"), "--run_dir", str(sweep), "--requeue", "false"]
    values = ["lr=0.001,0.002,1e-9", "seed=1,2"]
    run(RECIPES / "quickstart.py", "--submit", *flags, "--sweep", *values, slurm=slurm)
    finished = ["lr0.001-seed1", "lr0.001-seed2", "lr0.002-seed1"]
    _wait(sweep, finished, State.COMPLETED)
    _wait(sweep, ["lr0.002-seed2"], State.RUNNING)

    def shown(*words: str) -> str:
        command = [sys.executable, "-m", "megabatch.cli", "sweep", "show", str(sweep), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    runs, means = shown().split("\n\n")
    header, *lines = [line.split() for line in runs.splitlines()]
    assert header == ["run", "lr", "seed", "tokens/s", "memory_gib", "loss", "step", "state"]
    ranked = ["lr0.001-seed2", "lr0.002-seed1", "lr0.001-seed1", "lr0.002-seed2", "lr1e-9-seed1", "lr1e-9-seed2"]
    assert [line[0] for line in lines] == ranked
    assert lines[0][1:] == ["0.001", "2", "3", "0.5", "2", "3", "completed"]
    assert lines[3][-1] == "running" and lines[4][7:9] == ["pruned:", "learning_rate.min_lr=0.0005"]
    by_loss = json.loads(shown("--json", "--by", "loss"))
    assert [one["name"] for one in by_loss[:3]] == ["lr0.001-seed1", "lr0.002-seed1", "lr0.001-seed2"]
    assert (
        by_loss[0]["values"] == {"learning_rate.lr": 0.001, "training.seed": 1}
        and by_loss[0]["metrics"]["loss"] == 1.0
    )
    assert sorted(line.split()[:2] for line in means.splitlines()[2:]) == [["1", "0.002"], ["2", "0.001"]]
    subprocess.run(["scancel", "--name=quickstart"], check=True)
