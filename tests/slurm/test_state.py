"""What became of a run, from whoever still knows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm import queue
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.control import cancel, resume
from megabatch.slurm.logs import logs
from megabatch.slurm.processes import identity
from megabatch.slurm.queue import State
from megabatch.slurm.records import Start, record_start, record_submission
from megabatch.slurm.state import status

from .conftest import Submit, Submitted


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def beat(run: RunDirectory, **words: object) -> None:
    run.heartbeat.write_text(json.dumps({"time": time.time(), "step": 7, "state": "training"} | words))


def ended(run: RunDirectory, job_id: str, exit_code: int) -> None:
    with open(run.jobs, "a") as file:
        file.write(json.dumps({"job_id": job_id, "attempt": 2, "exit_code": exit_code, "time": 0}) + "\n")


@pytest.mark.usefixtures("no_slurm")
class TestWithoutSlurm:
    def test_nothing_yet(self, run: RunDirectory) -> None:
        assert status([run.path])[0].state is State.NOT_SUBMITTED

    def test_a_fresh_heartbeat_runs(self, run: RunDirectory) -> None:
        record_submission(run, "7")
        beat(run, job_id="7", attempt=1)
        now = status([run.path])[0]
        assert (now.state, now.source, now.step, now.attempt, now.job_id) == (State.RUNNING, "heartbeat", 7, 1, "7")

    def test_an_old_heartbeat_proves_nothing(self, run: RunDirectory) -> None:
        record_submission(run, "7")
        beat(run, job_id="7", time=time.time() - 1000)
        assert status([run.path])[0].state is State.LOST

    def test_a_heartbeat_of_the_future_proves_nothing(self, run: RunDirectory) -> None:
        """A clock was set back since."""
        record_submission(run, "7")
        beat(run, job_id="7", time=time.time() + 10_000)
        now = status([run.path])[0]
        assert (now.state, now.heartbeat_age_s) == (State.LOST, 0)

    def test_another_jobs_heartbeat_proves_nothing(self, run: RunDirectory) -> None:
        record_submission(run, "7")
        record_submission(run, "8")
        beat(run, job_id="7")
        assert status([run.path])[0].state is State.LOST

    @pytest.mark.parametrize(("code", "state"), [(0, State.COMPLETED), (75, State.STOPPED), (3, State.FAILED)])
    def test_the_batch_scripts_last_word(self, run: RunDirectory, code: int, state: State) -> None:
        record_submission(run, "7")
        ended(run, "7", code)
        now = status([run.path])[0]
        assert (now.state, now.source, now.exit_code, now.attempt) == (state, "records", code, 2)

    def test_done_is_done(self, run: RunDirectory) -> None:
        record_submission(run, "7")
        beat(run, job_id="7", state="done", time=0)
        assert status([run.path])[0].state is State.COMPLETED

    @pytest.mark.parametrize(
        ("word", "state"), [("stopped", State.STOPPED), ("failed", State.FAILED), ("x", State.LOST)]
    )
    def test_a_local_run_has_only_its_heartbeat(self, run: RunDirectory, word: str, state: State) -> None:
        beat(run, state=word, time=0)
        assert status([run.path])[0].state is state

    def test_a_dead_launcher_outranks_a_fresh_heartbeat(self, run: RunDirectory) -> None:
        """Killed by -9: nothing was written any more, and the run can be started again at once."""
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            record_start(run, Start(0, time.time(), "here", identity(process.pid)))
            beat(run, job_id=None)
            assert status([run.path])[0].state is State.RUNNING
            process.kill()
        now = status([run.path])[0]
        assert (now.state, now.heartbeat_age_s is not None and now.heartbeat_age_s < 60) == (State.LOST, True)

    @pytest.mark.parametrize(
        ("change", "state"),
        [
            (lambda place, pid, start: (f"other{place}", pid, start), State.RUNNING),  # lives, as far as is known here
            (lambda place, pid, start: (place, pid, str(int(start) + 1)), State.LOST),  # its number is used again
            (lambda place, pid, start: ("x", "y", "z"), State.RUNNING),
        ],
    )
    def test_another_host_and_a_number_that_is_used_again(
        self, run: RunDirectory, change: Callable[[str, str, str], tuple[str, str, str]], state: State
    ) -> None:
        place, pid, start = identity(os.getpid()).split(":")
        record_start(run, Start(0, time.time(), "somewhere", ":".join(change(place, pid, start))))
        beat(run, job_id=None)
        assert status([run.path])[0].state is state

    def test_broken_files_are_no_evidence(self, run: RunDirectory) -> None:
        run.heartbeat.write_text("{")
        run.jobs.write_text('{"job_id": "7", "time": 1, "cluster": null}\n{"job_id": "8", "ti')
        assert (status([run.path])[0].state, status([run.path])[0].job_id) == (State.LOST, "7")

    def test_a_thousand_runs_are_told(self, tmp_path: Path) -> None:
        runs = [RunDirectory(tmp_path / str(k)) for k in range(1000)]
        for k, run in enumerate(runs):
            run.path.mkdir()
            record_submission(run, str(k))
        assert [one.job_id for one in status([run.path for run in runs])] == [str(k) for k in range(1000)]

    def test_cancelling_and_resuming_nothing(self, run: RunDirectory) -> None:
        with pytest.raises(LaunchError, match="no job was submitted"):
            cancel(run.path)
        with pytest.raises(LaunchError, match="no stored job script"):
            resume(run.path)


def test_slurms_own_spellings() -> None:
    parsed = queue._parse("CANCELLED by 1000", exit_code="0:15", restarts="2")
    assert parsed == queue.JobState(State.CANCELLED, "", 143, 2)
    assert queue._parse("OUT_OF_ME+") is None
    assert queue._parse("FAILED", reason="NonZeroExitCode", exit_code="2:0") == queue.JobState(State.FAILED, "", 2)
    assert queue._parse("FAILED", exit_code="768") == queue.JobState(State.FAILED, "", 3)


@pytest.fixture
def finished(submit_payload: Submit) -> Submitted:
    job = submit_payload(options={"fail_rank": 0, "fail": 3})
    job.wait()
    return job


@pytest.mark.slurm
def test_each_of_slurms_commands_says_the_same(finished: Submitted) -> None:
    for ask in (queue._squeue, queue._scontrol):
        said = ask({finished.job_id}, queue.Daemon())[finished.job_id]
        assert (said.state, said.exit_code, said.restarts) == (State.FAILED, 3, 0)
        assert ask({finished.job_id, "99999999"}, queue.Daemon()).keys() >= {finished.job_id}
        assert "99999999" not in ask({"99999999"}, queue.Daemon())
    assert queue._sacct({finished.job_id}, queue.Daemon()) == {}, "this cluster has no accounting"


@pytest.mark.slurm
def test_a_controller_that_hangs_is_waited_for_once_and_said(
    finished: Submitted,
    slurm: PrivateCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(queue, "_PATIENCE_S", 2)
    controller = int((slurm.layout.directory / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGSTOP)
    try:
        assert queue.ask_slurm({finished.job_id}) == {}
    finally:
        os.kill(controller, signal.SIGCONT)
    assert capsys.readouterr().err == "warning: squeue did not answer within 2 s; using the runs' own files\n"
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
    assert queue.ask_slurm({finished.job_id}) == {} and capsys.readouterr().err == ""


@pytest.mark.slurm
def test_a_waiting_job_says_why_and_cannot_be_resumed(submit_payload: Submit) -> None:
    from megabatch.slurm.profile import ClusterProfile

    job = submit_payload(profile=ClusterProfile(sbatch={"begin": "now+1hour"}))
    now = job.wait(State.PENDING)
    assert now.reason == "BeginTime"
    with pytest.raises(LaunchError, match="is pending; cancel it"):
        resume(job.run.path)
    cancel(job.run.path)
    assert job.wait().state is State.CANCELLED
    with pytest.raises(LaunchError, match="nothing to cancel"):
        cancel(job.run.path)


@pytest.mark.slurm
def test_logs_are_read_by_rank_and_attempt_and_followed_to_the_end(submit_payload: Submit) -> None:
    job = submit_payload(tasks_per_node=2, options={"seconds": 1})
    followed = list(logs(job.run.path, rank=1, follow=True))
    assert followed == list(logs(job.run.path, rank=1))
    assert followed[-1] == '{"done": true}'
    assert job.wait().state is State.COMPLETED
    assert list(logs(job.run.path, rank=None)) == job.batch_log().splitlines()
    with pytest.raises(LaunchError, match=r"no log of rank 5, attempt 0 .*completed.*0\.0, 1\.0"):
        list(logs(job.run.path, rank=5, attempt=0))
