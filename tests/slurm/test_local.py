"""Running ranks on this machine without Slurm."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local import run_local

from .conftest import PAYLOAD, until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return JobSpec(name="local", run_directory=tmp_path / "a 'run'", tasks_per_node=2, python=sys.executable)


def with_options(job: JobSpec, **options: object) -> JobSpec:
    return replace(job, arguments=(str(PAYLOAD), *(f"{name}={value}" for name, value in options.items())))


def first_line(job: JobSpec, rank: int, attempt: int = 0) -> dict[str, dict[str, str]]:
    line: dict[str, dict[str, str]] = json.loads(job.files.rank_log(rank, attempt).read_text().splitlines()[0])
    return line


@pytest.mark.parametrize("name", ["MASTER_PORT", "RANK", "MEGABATCH_RUN", "HF_TOKEN"])
def test_variables_that_a_job_script_would_refuse_are_refused_here_too(job: JobSpec, name: str) -> None:
    with pytest.raises(LaunchError, match=rf"environment\.{name} "):
        run_local(replace(job, environment={name: "1234abcd"}))
    assert not job.files.jobs.exists() and not list(job.files.logs.glob("rank_*"))


def test_ranks_get_their_environment_and_logs_and_rank_0_the_terminal(job: JobSpec, tmp_path: Path) -> None:
    terminal = io.BytesIO()
    run = with_options(replace(job, environment={"EXTRA": "1"}), meet=tmp_path / "met.json")
    assert run_local(run, terminal=terminal) == 0
    assert json.loads((tmp_path / "met.json").read_text()) == [1]
    for rank in range(2):
        environment = first_line(job, rank)["environment"]
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (environment["MASTER_ADDR"], environment["MEGABATCH_ATTEMPT"]) == ("127.0.0.1", "0")
        assert (environment["OMP_NUM_THREADS"], environment["EXTRA"]) == ("1", "1")
    assert terminal.getvalue() == job.files.rank_log(0, 0).read_bytes()


def test_each_run_counts_as_an_attempt(job: JobSpec) -> None:
    for attempt in range(2):
        run_local(with_options(job), terminal=io.BytesIO())
        assert first_line(job, 1, attempt)["environment"]["MEGABATCH_ATTEMPT"] == str(attempt)


@pytest.mark.parametrize(("fail", "code"), [("3", 3), ("kill", 137)])
def test_one_dead_rank_ends_the_others(job: JobSpec, fail: str, code: int) -> None:
    assert run_local(with_options(job, fail_rank=1, fail=fail, until_attempt=1), terminal=io.BytesIO()) == code
    assert "done" not in job.files.rank_log(0, 0).read_text()


def test_a_rank_that_hangs_is_named_and_ends_the_run(job: JobSpec) -> None:
    terminal = io.BytesIO()
    run = with_options(replace(job, hang_timeout_s=15), fail_rank=1, fail="hang", until_attempt=1)
    assert run_local(run, terminal=terminal) == 124
    for text in (terminal.getvalue().decode(), job.files.batch_log("local").read_text()):
        assert "megabatch: the run hangs; rank 1 on " in text and " does not answer" in text
    [marker] = job.files.logs.glob("failed.*")
    assert marker.read_text().split()[:2] == ["1", "124"]
    assert "rank 0 is at step 7, training" in job.files.rank_log(0, 0).read_text()


def test_a_command_that_is_not_there_is_an_error(job: JobSpec) -> None:
    with pytest.raises(LaunchError, match="cannot run /no/such/python"):
        run_local(replace(job, python="/no/such/python"))


LAUNCHER = """
import sys
from pathlib import Path
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local import run_local
run, arguments = sys.argv[1], tuple(sys.argv[2:])
job = JobSpec(name="local", run_directory=Path(run), tasks_per_node=2, python=sys.executable, arguments=arguments)
sys.exit(run_local(job))
"""


def launch(job: JobSpec, **options: object) -> subprocess.Popen[bytes]:
    words = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-c", LAUNCHER, str(job.run_directory), str(PAYLOAD), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    until(lambda: all(job.files.rank_log(rank, 0).exists() for rank in range(2)))
    return process


def listening(job: JobSpec) -> bool:
    return all("argv" in job.files.rank_log(rank, 0).read_text() for rank in range(2))


def rank_pids(job: JobSpec) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"MEGABATCH_RUN={job.run_directory}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_asks_to_stop_and_75_stays_75(job: JobSpec, number: signal.Signals) -> None:
    process = launch(job, until_attempt=1)
    until(lambda: listening(job))
    process.send_signal(number)
    assert process.wait(300) == 75
    assert all('{"stopped": "SIGUSR2"}' in job.files.rank_log(rank, 0).read_text() for rank in range(2))


def test_a_request_before_the_ranks_listen_is_not_lost(job: JobSpec) -> None:
    process = launch(job, until_attempt=1, deaf="asked")
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 75
    assert '{"stopped": "file"}' in job.files.rank_log(1, 0).read_text()
    assert not list(job.files.logs.glob("stop*"))


def test_a_second_signal_kills(job: JobSpec) -> None:
    process = launch(job, deaf="ever")
    process.send_signal(signal.SIGINT)
    until(lambda: list(job.files.logs.glob("stop.*")), what="the first request")
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 137
    assert not rank_pids(job)


def test_ranks_die_with_a_killed_launcher(job: JobSpec) -> None:
    process = launch(job, until_attempt=1)
    until(lambda: listening(job))
    process.kill()
    process.wait()
    until(lambda: not rank_pids(job), what="the ranks to die")
