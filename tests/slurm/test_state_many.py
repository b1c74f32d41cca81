"""Many runs at once: asked about, cancelled and resumed together; logs over requeues."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.run_directory import RunDirectory
from megabatch.slurm.array import JobArray, render_array
from megabatch.slurm.local import run_local
from megabatch.slurm.logs import logs, rank_logs
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.render import render
from megabatch.slurm.state import status
from megabatch.slurm.submit import submit, submit_array

from .conftest import PAYLOAD, Submit, payload_spec, until


@pytest.fixture
def sweep(slurm: object, tmp_path: Path) -> list[RunDirectory]:
    """Three elements of one array that run until they are asked to stop, and run.json in each."""
    options = (str(PAYLOAD), "until_attempt=1000")
    jobs = [
        replace(payload_spec(tmp_path), run_directory=tmp_path / "sweep" / name, arguments=options, requeue=False)
        for name in ("a", "b", "c")
    ]
    for job in jobs:
        job.files.logs.mkdir(parents=True)
        job.files.run_json.write_text("{}")
        job.files.script.write_text(render(job, ClusterProfile()))
    scripts = [render(job, ClusterProfile()) for job in jobs]
    array = JobArray(name="sweep", folder=tmp_path / "array", jobs=tuple(jobs))
    array.folder.mkdir()
    submit_array(array, render_array(array, ClusterProfile(), scripts=scripts))
    return [job.files for job in jobs]


def states(runs: list[RunDirectory]) -> list[State]:
    return [found.state for found in status([run.path for run in runs], fresh_s=0)]


@pytest.mark.slurm
def test_a_sweep_is_cancelled_and_resumed_as_a_whole(
    sweep: list[RunDirectory], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tmp_path / "sweep")
    until(lambda: all(run.rank_log(0, 0).exists() and run.rank_log(0, 0).read_text() for run in sweep))
    assert main(["cancel", str(sweep[1].path)]) == 0, "one element"
    until(lambda: states(sweep) == [State.RUNNING, State.CANCELLED, State.RUNNING])
    assert main(["cancel", folder]) == 0
    assert "cancelled job" in capsys.readouterr().out
    until(lambda: states(sweep) == [State.CANCELLED] * 3)
    assert main(["cancel", folder]) == 1
    assert "none of the 3 runs is in the queue" in capsys.readouterr().err
    assert main(["resume", folder]) == 0
    until(lambda: states(sweep) == [State.RUNNING] * 3)
    # each is a job of its own now, and its second attempt
    jobs = [read_records(run) for run in sweep]
    assert [["_" in job.job_id for job in found] for found in jobs] == [[True, False]] * 3
    until(lambda: all(run.rank_log(0, 1).exists() for run in sweep))
    assert main(["resume", folder]) == 1
    assert "none of the 3 runs can be resumed" in capsys.readouterr().err
    assert main(["cancel", folder]) == 0


@pytest.mark.slurm
def test_each_of_slurms_commands_is_called_once_for_all_runs(
    sweep: list[RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "sacct", "scontrol", "scancel"):
        real = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
        wrapper = tmp_path / "bin" / name
        wrapper.write_text(f'#!/bin/sh\necho {name} >>{calls}\nexec {real} "$@"\n')
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert main(["status", "--json", str(tmp_path / "sweep")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["job_id"].partition("_")[2] for one in found] == ["0", "1", "2"]
    assert calls.read_text().split() == ["squeue"]
    calls.unlink()
    assert main(["cancel", str(tmp_path / "sweep")]) == 0
    assert calls.read_text().split().count("scancel") == 1


@pytest.mark.slurm
def test_logs_are_followed_over_a_requeue(submit_payload: Submit, scontrol: Callable[..., str]) -> None:
    job = submit_payload(options={"until_attempt": 1})
    job.wait_listening()
    followed: list[str] = []
    reader = threading.Thread(target=lambda: followed.extend(logs(job.run.path, follow=True)))
    reader.start()
    scontrol("requeue", job.job_id)
    job.wait(State.PENDING)
    scontrol("update", f"JobId={job.job_id}", "StartTime=now+1")
    job.wait(State.COMPLETED)
    reader.join(100)
    assert not reader.is_alive()
    written = [log.path.read_text().splitlines() for log in rank_logs(job.run.path)]
    assert len(written) >= 2 and followed == [line for lines in written for line in lines]
    assert any(line.startswith('{"stopped"') for line in followed) and followed[-1] == '{"done": true}'


def test_a_local_run_is_known_by_its_launcher_and_cancelled(tmp_path: Path) -> None:
    job = replace(payload_spec(tmp_path), python="python3", arguments=("-c", "raise SystemExit(3)"))
    job.run_directory.mkdir()
    assert run_local(job) == 3
    found = status([job.run_directory])[0]
    assert (found.state, found.source, found.exit_code, found.job_id) == (State.FAILED, "records", 3, "local")
    assert job.files.marker("failed", "local", 0).read_text().split()[:2] == ["0", "3"]
    code = (
        "import sys; from pathlib import Path\nfrom megabatch.slurm.job import JobSpec\n"
        "from megabatch.slurm.local import run_local\n"
        f"sys.exit(run_local(JobSpec(name='x', run_directory=Path({str(job.run_directory)!r}), python=sys.executable,"
        f" arguments=({str(PAYLOAD)!r}, 'until_attempt=1000'))))"
    )

    job.files.run_json.write_text("{}")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL) as launcher:
        until(lambda: status([job.run_directory])[0].state is State.RUNNING)
        until(lambda: "argv" in job.files.rank_log(0, 1).read_text())
        assert main(["cancel", str(job.run_directory)]) == 0
        assert launcher.wait(300) == 75
    assert status([job.run_directory])[0].state is State.STOPPED


FAILING = """
import os, sys, time
if os.environ["RANK"] == "2":
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", file=sys.stderr)
    sys.exit(70)
while not os.path.exists(os.environ["MEGABATCH_FAILED"]):
    time.sleep(0.05)  # the others lose their peer once it has ended
print("RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:4242", file=sys.stderr)
sys.exit(70)
"""


@pytest.mark.slurm
def test_why_names_rank_node_and_cause(slurm: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = replace(payload_spec(tmp_path), nodes=2, tasks_per_node=2, arguments=("-c", FAILING), requeue=False)
    profile = ClusterProfile(sbatch={"nodelist": "n[3-4]"})
    job_id = submit(job.files, render(job, profile)).job_id
    job.files.run_json.write_text("{}")
    until(lambda: status([job.run_directory], fresh_s=0)[0].state is State.FAILED)
    assert main(["why", "--json", str(job.run_directory)]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"class": "oom_gpu", "rank": 2, "node": "n4", "exit_code": 70, "attempt": 0, "job_id": job_id}
    assert found | expected == found and found["line"] == 1
    assert set(found["followers"]) <= {0, 1, 3}


@pytest.mark.slurm
def test_why_without_an_attempt(slurm: object, submit_payload: Submit, capsys: pytest.CaptureFixture[str]) -> None:
    first = submit_payload(options={"until_attempt": 1})
    waiting = submit_payload(
        run_directory=first.run.path.with_name("second"),
        profile=ClusterProfile(sbatch={"dependency": f"afterok:{first.job_id}"}),
    )
    waiting.run.run_json.write_text("{}")
    waiting.wait(State.PENDING)
    assert main(["why", str(waiting.run.path)]) == 0
    assert "[dependency]" in capsys.readouterr().out
    assert main(["cancel", str(waiting.run.path)]) == 0
    waiting.wait(State.CANCELLED)
    assert main(["why", str(waiting.run.path)]) == 0
    assert "[cancelled]" in capsys.readouterr().out
    subprocess.run(["scancel", first.job_id], check=True)
