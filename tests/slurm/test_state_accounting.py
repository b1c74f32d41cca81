"""What became of jobs on a Slurm with accounting, while its controller knows them and after it has forgotten them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabatch.slurm import queue
from megabatch.slurm.cluster import PrivateCluster, missing_programs
from megabatch.slurm.queue import JobState, State, ask_slurm

from .conftest import until

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateCluster]:
    missing = missing_programs(accounting=True)
    if missing:
        pytest.skip(
            f"no accounting here: {', '.join(missing)} missing; on Debian: apt install slurmdbd mariadb-server"
        )
    directory = tmp_path_factory.mktemp("accounting")
    with pytest.MonkeyPatch.context() as environment:
        cluster = PrivateCluster.start(nodes=2, directory=directory, accounting=True, min_job_age_s=6)
        for name, value in cluster.environment.items():
            environment.setenv(name, value)
        yield cluster
        cluster.stop()


def sbatch(script: str, *options: str) -> str:
    command = ["sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=True)


def running(job_id: str) -> bool:
    return ask_slurm({job_id})[job_id][1].state is State.RUNNING


def cancelled() -> str:
    job_id = sbatch("sleep 100")
    until(lambda: running(job_id))
    subprocess.run(["scancel", job_id], check=True)
    return job_id


def requeued(folder: Path) -> str:
    job_id = sbatch(f'[ "${{SLURM_RESTART_COUNT:-0}}" -eq 1 ] || {{ touch {folder}/runs; sleep 100; }}', "--requeue")
    until((folder / "runs").exists)
    scontrol("requeue", job_id)
    until(lambda: not running(job_id))
    scontrol("update", f"JobId={job_id}", "StartTime=now+1")
    return job_id


@pytest.mark.usefixtures("cluster")
def test_sacct_agrees_with_squeue_and_remembers_what_the_controller_forgets(tmp_path: Path) -> None:
    array = sbatch('exit "$SLURM_ARRAY_TASK_ID"', "--array=0-1")
    expected = {
        sbatch("true"): State.COMPLETED,
        sbatch("exit 3"): State.FAILED,
        f"{array}_0": State.COMPLETED,
        f"{array}_1": State.FAILED,
        cancelled(): State.CANCELLED,
        requeued(tmp_path): State.COMPLETED,
    }
    jobs = set(expected)

    def states(answers: dict[str, JobState]) -> dict[str, State]:
        return {job_id: said.state for job_id, said in answers.items()}

    until(lambda: states(queue._sacct(jobs, queue.Daemon())) == expected, what="sacct to know how all ended")
    exit_codes = {job_id: said.exit_code for job_id, said in queue._sacct(jobs, queue.Daemon()).items()}
    assert sorted(code for code in exit_codes.values() if code) == [1, 3]
    controllers = (queue._squeue, queue._scontrol)
    until(lambda: not any(ask(jobs, queue.Daemon()) for ask in controllers), what="the controller to forget the jobs")
    assert {job_id: (source, said.state) for job_id, (source, said) in ask_slurm(jobs).items()} == {
        job_id: ("sacct", state) for job_id, state in expected.items()
    }


@pytest.mark.usefixtures("cluster")
def test_elements_that_wait_are_told_apart() -> None:
    array = sbatch("true", "--array=2-9:3,11%2", "--begin=now+1hour")
    elements = {f"{array}_{task}" for task in (2, 5, 8, 11)}
    for ask in (queue._squeue, queue._scontrol, queue._sacct):
        until(
            lambda ask=ask: ask(elements, queue.Daemon()).keys() == elements,
            what=f"{ask.__name__} to know all elements",
        )
        assert {said.state for said in ask(elements, queue.Daemon()).values()} == {State.PENDING}
    # one that never started is forgotten at once: jobs.jsonl remembers that it was cancelled
    subprocess.run(["scancel", f"{array}_5"], check=True)
    until(lambda: ask_slurm(elements).keys() == elements - {f"{array}_5"})
    subprocess.run(["scancel", array], check=True)


def test_the_database_is_closed_to_others(cluster: PrivateCluster) -> None:
    layout = cluster.layout
    closed = [layout.directory / "database", layout.socket_directory / "database", layout.directory / "slurmdbd.conf"]
    assert [path.stat().st_mode & 0o077 for path in closed] == [0, 0, 0]
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    port = f":{layout.accounting_port:04X}"
    assert [line.split()[1] for line in listening if line.split()[1].endswith(port) and line.split()[3] == "0A"] == [
        f"0100007F{port}"
    ]
    assert os.environ["SLURM_CONF"] == str(layout.configuration)
