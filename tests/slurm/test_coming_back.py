"""Which failures put a job back into the queue, and for how long, on a real Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megabatch.insight.diagnosis import diagnose
from megabatch.run_directory import ExitCode
from megabatch.slurm.control import resume
from megabatch.slurm.processes import tagged_processes
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records

from .conftest import Submit, Submitted, until

pytestmark = pytest.mark.slurm

NODES = ClusterProfile(partition="urgent")


def codes(job: Submitted) -> list[int]:
    return [ending.exit_code for ending in read_records(job.run)[0].endings]


def test_a_killed_rank_puts_the_job_back_until_attempts_make_no_progress(submit_payload: Submit) -> None:
    options = {"fail_rank": 1, "fail": "kill", "until_attempt": 9, "save_until": 2}
    job = submit_payload(profile=NODES, nodes=2, max_requeues_without_progress=1, options=options)
    end = job.wait()
    assert (end.state, end.exit_code, end.attempt) == (State.FAILED, 137, 3)
    assert "not requeued: 2 attempts in a row ended without a checkpoint newer than step_00000001" in job.batch_log()
    assert "resume with: megabatch resume" in job.batch_log()
    # the requeue that the job itself asked for leaves `DUE TO JOB REQUEUE` in each attempt's part of the log
    for attempt in range(4):
        found = diagnose(job.run.path, attempt=attempt)
        assert found.cause is not None and (found.cause.name, found.rank) == ("killed", 1), found


@pytest.mark.parametrize("code", [ExitCode.FAILED, ExitCode.CONFIG])
def test_a_fault_with_a_message_of_its_own_is_final(submit_payload: Submit, code: int) -> None:
    job = submit_payload(profile=NODES, options={"fail_rank": 0, "fail": int(code), "save_until": 1})
    end = job.wait()
    assert (end.state, end.exit_code, end.attempt) == (State.FAILED, code, 0)
    assert "requeue" not in job.batch_log()


def test_a_rank_that_hangs_is_named_and_the_job_comes_back(submit_payload: Submit) -> None:
    options = {"fail_rank": 1, "fail": "hang", "fail_until": 1, "until_attempt": 1}
    job = submit_payload(profile=NODES, nodes=2, hang_timeout_s=15, options=options)
    end = job.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 1)
    assert codes(job) == [ExitCode.HUNG, ExitCode.DONE]
    log = job.batch_log()
    assert "the run hangs; rank 1 on n2 does not answer" in log
    assert f"rank 1 on n2 failed first, with exit code {ExitCode.HUNG}: logs/rank_1.0.log" in log
    found = diagnose(job.run.path, attempt=0)
    assert found.cause is not None and (found.cause.name, found.rank, found.node) == ("hung", 1, "n2")


def test_ranks_that_do_not_save_before_the_limit_are_ended_and_come_back(submit_payload: Submit) -> None:
    job = submit_payload(profile=NODES, signal_delay_s=2, options={"deaf": "ever"})
    until(lambda: job.now().state is State.RUNNING and job.run.rank_log(0, 0).exists(), what="the rank")
    subprocess.run(["scancel", "--batch", "--signal=USR2", job.job_id], check=True)
    until(lambda: codes(job), what="the end of the first attempt")
    assert "the ranks have not saved in 1 s" in job.batch_log()
    until(lambda: (job.now().attempt or 0) > 0, what="the requeue")
    subprocess.run(["scancel", job.job_id], check=True)
    assert codes(job)[0] == 137


def test_a_controller_that_is_away_for_a_moment_costs_no_requeue(
    submit_payload: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "bin" / "scontrol"
    wrapper.parent.mkdir()
    wrapper.write_text(f"""#!/bin/bash
case "$*" in *"show job"* | requeue*)
    echo >>"{tmp_path}/$1"
    if [ "$(wc -l <"{tmp_path}/$1")" -le 2 ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi ;;
esac
exec {shutil.which("scontrol")} "$@"
""")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    job = submit_payload(profile=NODES, options={"fail_rank": 0, "fail": "kill", "fail_until": 1})
    end = job.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 1)
    assert codes(job) == [137, ExitCode.DONE]
    assert job.batch_log().count("Unable to contact") == 4, "twice whether it is still ours, twice for the requeue"


def test_an_srun_that_the_controller_sends_away_asks_again(
    submit_payload: Submit, controller_sends_srun_away: Callable[[int], None]
) -> None:
    controller_sends_srun_away(2)
    job = submit_payload(profile=NODES, preflight="light", requeue=False)
    end = job.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 0)
    assert codes(job) == [ExitCode.DONE]
    assert job.batch_log().count("did not answer srun: trying again") == 2, "for the preflight and for the ranks"
    assert "no verdict" not in job.batch_log()


def test_so_do_the_ranks_and_the_warning_meanwhile_stops_them(
    submit_payload: Submit, controller_sends_srun_away: Callable[[int], None]
) -> None:
    controller_sends_srun_away(10_000)
    job = submit_payload(profile=NODES, requeue=False)
    until(lambda: "trying again" in job.batch_log(), what="the second try")
    subprocess.run(["scancel", "--batch", "--signal=USR2", job.job_id], check=True)
    until(lambda: codes(job), what="the end")
    assert codes(job) == [ExitCode.REQUEUE]
    assert not job.run.rank_log(0, 0).exists()


def test_a_killed_srun_puts_the_job_back_and_resume_ends_slurms_hold(
    submit_payload: Submit, scontrol: Callable[..., str]
) -> None:
    def held_until() -> str:
        found = re.search(r"EligibleTime=(\S+)", scontrol("show", "job", job.job_id))
        assert found
        return found[1]

    job = submit_payload(profile=NODES, options={"until_attempt": 1})
    job.wait_listening()
    [srun] = [
        pid
        for pid in tagged_processes(f"MEGABATCH_RUN={job.run.path}")
        if os.readlink(f"/proc/{pid}/exe").endswith("/srun") and parent(pid) not in sruns(job)
    ]
    os.kill(srun, signal.SIGKILL)
    until(lambda: job.now().reason == "BeginTime", what="the job to be held")
    before = held_until()
    assert resume(job.run.path) == job.job_id
    assert held_until() < before
    end = job.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 1)


def sruns(job: Submitted) -> set[int]:
    pids = tagged_processes(f"MEGABATCH_RUN={job.run.path}")
    return {pid for pid in pids if os.readlink(f"/proc/{pid}/exe").endswith("/srun")}


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
