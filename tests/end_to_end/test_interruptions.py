"""A run that is stopped, preempted, killed or loses a node ends exactly as one that nobody disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megabatch.run_directory import ExitCode
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.processes import tagged_processes
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records

from .conftest import SAVED_EVERY, STEPS, NewTraining, Training, until

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module", autouse=True)
def time_limited(new_training: NewTraining) -> Training:
    """Stands still after some steps until its time is up, and costs the other tests nothing while it does."""
    # both attempts may take their time: its limit is soon after it stands still, and far away again for the second
    longer = '[ "$MEGABATCH_ATTEMPT" = 0 ] || scontrol update "JobId=$SLURM_JOB_ID" TimeLimit=60'
    training = new_training("limit", on="n[3-4]", time="60", signal_delay_s=30, held_after=7, setup=[longer])
    training.wait_step(7)
    [record] = read_records(training.files)
    minutes = int(time.time() - record.starts[0].time) // 60 + 2
    command = ["scontrol", "update", f"JobId={record.job_id}", f"TimeLimit={minutes}"]
    subprocess.run(command, env=training.environment, check=True)
    return training


def require_same_end(training: Training, uninterrupted: Training) -> None:
    assert training.curves() == uninterrupted.curves()
    assert training.exported() == uninterrupted.exported()
    assert training.files.latest.read_text().strip() == f"step_{STEPS:08d}"


def steps_of_attempts(training: Training) -> tuple[list[int], list[int]]:
    """The steps done before and after the one requeue."""
    lines = training.lines("train")
    assert {line["attempt"] for line in lines} == {0, 1}
    return ([line["step"] for line in lines if line["attempt"] == attempt] for attempt in (0, 1))  # type: ignore[return-value]


def require_saved_at_once(training: Training) -> None:
    """The first attempt saved the very step that it left after, well before the end."""
    first, second = steps_of_attempts(training)
    assert [*first, *second] == list(range(1, STEPS + 1)), "no step was lost or done twice"
    assert first[-1] < STEPS / 2


def test_cancelled_then_resumed(new_training: NewTraining, uninterrupted: Training) -> None:
    training = new_training("cancelled", save_total_limit=2, held_after=12)
    training.wait_step(12)
    training.megabatch("cancel")
    training.wait(State.CANCELLED)
    assert training.checkpoints()[-1] == training.steps()[-1] < STEPS / 2, "every step that was done is saved"
    training.megabatch("resume")
    training.wait(State.COMPLETED)
    assert training.steps() == list(range(1, STEPS + 1)), "no step was done twice"
    assert training.checkpoints() == [STEPS - SAVED_EVERY, STEPS]
    require_same_end(training, uninterrupted)


def test_preempted(new_training: NewTraining, uninterrupted: Training) -> None:
    training = new_training("preempted", held_after=12)
    training.wait_step(12)
    urgent = ("--partition=urgent", "--nodelist=n[1-2]", "--nodes=2", "--exclusive", "--output=/dev/null", "--quiet")
    subprocess.run(["sbatch", "--wait", *urgent, "--wrap=true"], env=training.environment, check=True, timeout=300)
    assert training.wait(State.COMPLETED).attempt == 1
    require_saved_at_once(training)
    require_same_end(training, uninterrupted)


def test_a_node_stops_answering(new_training: NewTraining, uninterrupted: Training, slurm: PrivateCluster) -> None:
    training = new_training("node", held_after=2 * SAVED_EVERY + 2)
    training.wait_step(2 * SAVED_EVERY + 2)
    slurmd = daemon_of(slurm, "n2")
    processes = tagged_processes(f"MEGABATCH_RUN={training.files.path}", also="SLURMD_NODENAME=n2")
    for pid in (slurmd, *processes):
        os.kill(pid, signal.SIGSTOP)
    try:
        scontrol("update", "NodeName=n2", "State=DOWN", "Reason=test")
        until(lambda: (training.now().attempt or 0) > 0, timeout_s=400, what="Slurm to requeue it")
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        os.kill(slurmd, signal.SIGCONT)
        until(bring_back, timeout_s=400, what="n2 to come back")
    assert training.wait(State.COMPLETED).attempt == 1
    first, second = steps_of_attempts(training)
    assert second[0] == first[-1] // SAVED_EVERY * SAVED_EVERY + 1, "it went on from the last periodic checkpoint"
    require_same_end(training, uninterrupted)


def daemon_of(cluster: PrivateCluster, node: str) -> int:
    """The node's slurmd."""
    found = tagged_processes(f"MEGABATCH_PRIVATE_CLUSTER={cluster.layout.directory}")
    command = ["-D", "-N", node, ""]
    [pid] = [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1:] == command]
    return pid


def scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout


def bring_back() -> bool:
    """Slurm refuses while the node is still being cleaned up."""
    with contextlib.suppress(subprocess.CalledProcessError):
        scontrol("update", "NodeName=n2", "State=RESUME")
        return True
    return "State=DOWN" not in scontrol("show", "node", "n2")


DIES_WHILE_IT_SAVES = f"""
import os, signal, sys

def die(event, arguments):
    if event == "open" and "/.step_{2 * SAVED_EVERY:08d}.tmp/mcore/" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1" and os.environ.get("MEGABATCH_ATTEMPT") == "0":
    sys.addaudithook(die)
"""
"""Kills rank 1 of the first attempt when it opens its file of the second checkpoint."""


def test_a_rank_is_killed_while_it_saves(new_training: NewTraining, uninterrupted: Training) -> None:
    # it stays where it fell, so that what it left can be looked at; test_faults.py has killed ranks that come back
    training = new_training("killed", fault=DIES_WHILE_IT_SAVES, requeue="false")
    training.wait(State.FAILED, timeout_s=400)
    assert "rank 1 on n2 failed first, with exit code 137: logs/rank_1.0.log" in training.logs()
    assert training.checkpoints() == [SAVED_EVERY], "what was half written has no final name"
    assert training.files.latest.read_text().strip() == f"step_{SAVED_EVERY:08d}"
    half_written = training.files.checkpoints / f".step_{2 * SAVED_EVERY:08d}.tmp"
    assert half_written.is_dir()
    log = training.files.rank_log(0, 0).read_text()
    assert "error: a rank that this one was talking to is gone" in log and "Traceback" not in log
    with open(training.files.metrics, "a") as file:
        file.write('{"kind": "tra')  # what a full disk leaves
    training.megabatch("resume")
    assert training.wait(State.COMPLETED).attempt == 1
    assert not half_written.exists()
    require_same_end(training, uninterrupted)


def test_going_back_to_a_checkpoint(new_training: NewTraining, uninterrupted: Training) -> None:
    training = new_training("back", requeue="false", save_total_limit=9)
    training.wait(State.COMPLETED)
    training.megabatch("resume", "--from", f"step_{2 * SAVED_EVERY:08d}")
    assert training.wait(State.COMPLETED).attempt == 1
    assert training.steps() == [*range(1, STEPS + 1), *range(2 * SAVED_EVERY + 1, STEPS + 1)]
    later = {path.name for path in training.files.checkpoints.glob("later.*")}
    assert later == {f"later.step_{step:08d}" for step in range(3 * SAVED_EVERY, STEPS + 1, SAVED_EVERY)}
    require_same_end(training, uninterrupted)


def test_the_time_limit(time_limited: Training, uninterrupted: Training) -> None:
    training = time_limited
    assert training.wait(State.COMPLETED).attempt == 1
    require_saved_at_once(training)
    endings = [(ending.attempt, ending.exit_code) for ending in read_records(training.files)[0].endings]
    assert endings == [(0, ExitCode.REQUEUE), (1, ExitCode.DONE)]
    require_same_end(training, uninterrupted)
