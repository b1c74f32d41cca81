"""Many jobs on this machine, a few at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.run_directory import RunDirectory
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local_array import device_shares, run_local_array
from megabatch.slurm.processes import tagged_processes
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.records import read_records

from .conftest import PAYLOAD, Submitted, until


def _jobs(folder: Path, *options: str, **spec: int) -> list[JobSpec]:
    return [
        JobSpec(
            name=name, run_directory=folder / name, python=sys.executable, arguments=(str(PAYLOAD), option), **spec
        )
        for name, option in zip("abcdefgh", options, strict=False)
    ]


def _said(job: JobSpec, rank: int = 0) -> list[dict[str, object]]:
    return Submitted(job.files, "local").said(rank)


def test_each_is_a_run_of_its_own_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    jobs = _jobs(tmp_path, "seconds=0.3", "fail_rank=0", "seconds=0.3", "seconds=0.3", tasks_per_node=2)
    jobs[1] = replace(jobs[1], arguments=(*(jobs[1].arguments or ()), "fail=3"))
    reported: list[tuple[str, str]] = []
    codes = run_local_array(
        jobs, ClusterProfile(), max_parallel=2, report=lambda job, text: reported.append((job.name, text))
    )
    assert codes == [0, 3, 0, 0]
    assert sorted(reported) == sorted(
        [(name, "started") for name in "abcd"]
        + [(name, "done") for name in "acd"]
        + [("b", "failed with exit code 3")]
    )
    running, most = 0, 0
    for _, text in reported:
        running += 1 if text == "started" else -1
        most = max(most, running)
    assert most == 2
    for job, code in zip(jobs, codes, strict=True):
        (record,) = read_records(job.files)
        assert record.endings[-1].exit_code == code
    environments = [_said(job, rank)[0]["environment"] for job in jobs for rank in (0, 1)]
    assert all(isinstance(one, dict) and one["WORLD_SIZE"] == "2" for one in environments)
    ports = [_said(job)[0]["environment"]["MASTER_PORT"] for job in jobs[:2]]  # type: ignore[index]
    assert len(set(ports)) == 2


STOPPED = """
import sys
from pathlib import Path
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local_array import run_local_array
from megabatch.slurm.profile import ClusterProfile
jobs = [JobSpec(name=name, run_directory=Path({folder!r}, name), python=sys.executable,
                arguments=({payload!r}, "until_attempt=1")) for name in "abc"]
print(*map(int, run_local_array(jobs, ClusterProfile(), max_parallel=2, report=lambda job, text: None)))
"""


def test_a_request_to_stop_reaches_all_that_run_and_starts_no_more(tmp_path: Path) -> None:
    script = STOPPED.format(folder=str(tmp_path), payload=str(PAYLOAD))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    runs = [RunDirectory(tmp_path / name) for name in "abc"]
    until(lambda: all(Submitted(run, "local").said(0) for run in runs[:2]), what="two that run")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert out == "75 75 75\n"
    assert all(Submitted(run, "local").said(0)[-1] == {"stopped": "SIGUSR2"} for run in runs[:2])
    assert not runs[2].logs.exists()


def test_killing_the_launcher_leaves_nothing_running(tmp_path: Path) -> None:
    script = STOPPED.format(folder=str(tmp_path), payload=str(PAYLOAD))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    runs = [RunDirectory(tmp_path / name) for name in "ab"]
    until(lambda: all(Submitted(run, "local").said(0) for run in runs), what="two that run")
    process.kill()
    process.wait()
    tags = [f"MEGABATCH_RUN={run.path}" for run in runs]
    until(lambda: not any(tagged_processes(tag) for tag in tags), what="the end of all ranks")


def test_gpus_are_dealt_out_to_as_many_jobs_as_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_shares(2, visible=[str(i) for i in range(8)]) == ["0,1", "2,3", "4,5", "6,7"]
    assert device_shares(3, visible=[str(i) for i in range(8)]) == ["0,1,2", "3,4,5"]
    assert device_shares(8, visible=["0", "1"]) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-7")
    assert device_shares(1) == ["3", "5", "GPU-7"]


def test_a_job_on_gpus_sees_its_own_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    jobs = _jobs(tmp_path, "seconds=0.3", "seconds=0.3", "seconds=0", gpus_per_node=1)
    assert run_local_array(jobs, ClusterProfile(), max_parallel=8, report=lambda job, text: None) == [0, 0, 0]
    seen = [_said(job)[0]["environment"]["CUDA_VISIBLE_DEVICES"] for job in jobs]  # type: ignore[index]
    assert set(seen[:2]) == {"4", "5"} and seen[2] in ("4", "5")
