"""Job arrays on the private Slurm: each element is a run of its own, and submitit's traps stay shut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megabatch.errors import LaunchError
from megabatch.slurm.array import JobArray, array_directives, expected_start, max_array_size, render_array
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.control import cancel
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.render import render
from megabatch.slurm.state import status
from megabatch.slurm.submit import submit_array

from .conftest import PAYLOAD, Submitted, until

HOSTILE = [
    "two words",
    'it\'s "quoted"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;b&c|d",
    "ü-漢字",
    "100%a %j",
    "-n",
    "*",
]

pytestmark = pytest.mark.slurm


def _job(folder: Path, *options: str, **spec: Any) -> JobSpec:
    fields = {"cpus_per_task": 1, "time": "10", "arguments": (str(PAYLOAD), *options)}
    return JobSpec(name="payload", run_directory=folder, python=sys.executable, **(fields | spec))


def _array(folder: Path, jobs: Sequence[JobSpec], *, max_parallel: int | None = None, name: str = "s") -> JobArray:
    """Everything that must be in place before sbatch is called."""
    for job in jobs:
        job.files.path.mkdir(parents=True)
        job.files.script.write_text(render(job, ClusterProfile()))
    folder.mkdir(parents=True)
    return JobArray(name=name, folder=folder, jobs=tuple(jobs), max_parallel=max_parallel)


def _submit(array: JobArray) -> str:
    scripts = [job.files.script.read_text() for job in array.jobs]
    return submit_array(array, render_array(array, ClusterProfile(), scripts=scripts))


def _wait(jobs: Sequence[JobSpec], *wanted: State) -> None:
    def reached() -> bool:
        return all(one.state in wanted for one in status([job.run_directory for job in jobs], fresh_s=0))

    until(reached, what=f"{wanted}, now {status([job.run_directory for job in jobs], fresh_s=0)}")


def test_elements_are_runs_of_their_own_whatever_they_are_called(slurm: PrivateCluster, tmp_path: Path) -> None:
    jobs = [_job(tmp_path / "sweep" / name, f"number={number}") for number, name in enumerate(HOSTILE)]
    array = _array(tmp_path / "sweep" / "arrays of 'it' $(touch pwned)", jobs, name="$(touch pwned) `x` ü\n'")
    array_id = _submit(array)
    _wait(jobs, State.COMPLETED)
    for number, job in enumerate(jobs):
        files, job_id = job.files, f"{array_id}_{number}"
        lines = [json.loads(line) for line in files.jobs.read_text().splitlines()]
        assert {line["job_id"] for line in lines} == {job_id} and len(lines) == 3
        (record,) = read_records(files)
        assert record.endings[-1].exit_code == 0
        said = Submitted(files, job_id).said(0)
        assert said[0]["argv"] == [f"number={number}"]
        assert said[0]["environment"]["MEGABATCH_RUN"] == str(job.run_directory)
        assert (files.logs / f"batch.{job_id}.log").read_text().splitlines() == [
            f"megabatch: attempt 0 of job {job_id} on {record.starts[0].nodes}"
        ]
    assert array.folder.joinpath("batch.log").read_text() == ""
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_one_element_is_an_array_and_slurm_holds_our_text(
    slurm: PrivateCluster, tmp_path: Path, scontrol: Callable[..., str]
) -> None:
    """submitit makes a plain job of one element, and of several an executor that is not ours."""
    (job,) = jobs = [_job(tmp_path / "run", "seconds=0.2", preflight="light")]
    array = _array(tmp_path / "array", jobs)
    array_id = _submit(array)
    assert scontrol("write", "batch_script", array_id, "-") == array.files.script.read_text()
    _wait(jobs, State.COMPLETED)
    (record,) = read_records(job.files)
    assert record.job_id == f"{array_id}_0"
    log = (job.files.logs / f"batch.{array_id}_0.log").read_text()
    assert "preflight of 1 nodes: ok" in log and "no verdict" not in log


def test_no_more_run_at_a_time_than_asked(slurm: PrivateCluster, tmp_path: Path, scontrol: Callable[..., str]) -> None:
    jobs = [_job(tmp_path / str(number), "until_attempt=1") for number in range(5)]
    array_id = _submit(_array(tmp_path / "array", jobs, max_parallel=2))

    def states() -> list[State]:
        return [one.state for one in status([job.run_directory for job in jobs], fresh_s=0)]

    for number in (0, 1):
        Submitted(jobs[number].files, f"{array_id}_{number}").wait_listening()
    assert states() == [State.RUNNING] * 2 + [State.PENDING] * 3
    assert "ArrayTaskThrottle=2" in scontrol("show", "job", f"{array_id}_0")
    cancel(jobs[4].run_directory)
    assert states() == [State.RUNNING] * 2 + [State.PENDING] * 2 + [State.CANCELLED]
    subprocess.run(["scancel", array_id], check=True)
    _wait(jobs, State.CANCELLED)
    for number in (0, 1):
        run = Submitted(jobs[number].files, f"{array_id}_{number}")
        ending = until(lambda run=run: read_records(run.run)[0].endings, what="the batch script's last word")[0]
        assert "stopped" in run.said(0)[-1] and (ending.exit_code, ending.cancelled) == (75, True)


def test_an_element_that_is_told_to_stop_comes_back_alone(slurm: PrivateCluster, tmp_path: Path) -> None:
    jobs = [_job(tmp_path / str(number), "until_attempt=1") for number in range(2)]
    array_id = _submit(_array(tmp_path / "array", jobs))
    runs = [Submitted(job.files, f"{array_id}_{number}") for number, job in enumerate(jobs)]
    for run in runs:
        run.wait_listening()
    # the last element's own job id is the array's: by that number Slurm would requeue them all
    subprocess.run(["scancel", "--batch", "--signal=USR2", f"{array_id}_1"], check=True)
    runs[1].wait(State.COMPLETED)
    assert runs[0].now().state is State.RUNNING
    (record,) = read_records(jobs[1].files)
    assert [(ending.attempt, ending.exit_code) for ending in record.endings] == [(0, 75), (1, 0)]
    assert runs[1].said(0, attempt=1)[-1] == {"done": True}
    assert len(read_records(jobs[0].files)[0].starts) == 1
    subprocess.run(["scancel", array_id], check=True)


def test_a_folder_that_submitit_would_fill_in_is_refused_before_anything_is_queued(
    slurm: PrivateCluster, tmp_path: Path
) -> None:
    array = _array(tmp_path / "%a", [_job(tmp_path / "run")], name="refused")
    with pytest.raises(LaunchError, match=r"may not contain %j, %t, %A or %a"):
        _submit(array)
    queue = subprocess.run(
        ["squeue", "--noheader", "--name=refused"], check=True, capture_output=True, text=True
    ).stdout
    assert queue == "" and not array.jobs[0].files.jobs.exists()


def test_this_clusters_limit_and_its_next_start(slurm: PrivateCluster, tmp_path: Path) -> None:
    assert max_array_size() == 1001
    array = JobArray(name="s", folder=tmp_path, jobs=(_job(tmp_path / "run"),))
    assert (expected_start("\n".join(array_directives(array, ClusterProfile()))) or "").startswith("20")
    too_large = JobArray(name="s", folder=tmp_path, jobs=(_job(tmp_path / "run", nodes=99),))
    assert expected_start("\n".join(array_directives(too_large, ClusterProfile()))) is None
