"""Faults that clusters and people bring upon a run on the private Slurm, in a random order that a seed decides."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megabatch.slurm.processes import tagged_processes

from .conftest import Training, until


@dataclass(frozen=True)
class Struck:
    """A fault, and how long the run took to train again."""

    kind: str
    step: int
    """Newest step in metrics.jsonl when it struck."""
    back_s: float
    """From the fault to the next step of another attempt."""


def kill_a_rank(training: Training) -> None:
    os.kill(_any(training.ranks()), signal.SIGKILL)


def stop_a_rank(training: Training) -> None:
    """It hangs, and the others with it."""
    os.kill(_any(training.ranks()), signal.SIGSTOP)


def kill_srun(training: Training) -> None:
    found = tagged_processes(f"MEGABATCH_RUN={training.files.path}")
    sruns = {pid for pid in found if _executable(pid) == "srun"}
    os.kill(min(sruns), signal.SIGKILL)  # the first started the others


def warn_of_the_limit(training: Training) -> None:
    """What Slurm does `signal_delay_s` before the time limit."""
    _slurm(training, "scancel", "--batch", "--signal=USR2", _job(training))


def requeue(training: Training) -> None:
    _slurm(training, "scontrol", "requeue", _job(training))


def preempt(training: Training) -> None:
    nodes = _nodes(training)
    where = ("--partition=urgent", f"--nodelist={nodes}", "--nodes=2", "--exclusive", "--output=/dev/null", "--quiet")
    _slurm(training, "sbatch", "--wait", *where, "--wrap=true")


def take_a_node_down(training: Training) -> None:
    """Its slurmd is there all the time: the ranks of that node go on until Slurm or their peers end them."""
    hosts = _slurm(training, "scontrol", "show", "hostnames", _nodes(training)).split()
    node, attempt = random.choice(hosts), training.now().attempt or 0
    _slurm(training, "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=fault")
    try:
        until(lambda: (training.now().attempt or 0) > attempt, timeout_s=400, what="Slurm to requeue it")
    finally:
        until(lambda: _resumed(training, node), timeout_s=400, what=f"{node} to come back")


KINDS: dict[str, Callable[[Training], None]] = {
    "killed rank": kill_a_rank,
    "hung rank": stop_a_rank,
    "killed srun": kill_srun,
    "time limit": warn_of_the_limit,
    "scontrol requeue": requeue,
    "preemption": preempt,
    "node down": take_a_node_down,
}


def plan(number: int, *, steps: int, seed: int) -> list[tuple[int, str]]:
    """(step after which it strikes, kind): every kind once before any comes again, spread evenly over the run."""
    rng, kinds, share = random.Random(seed), [], steps // (number + 1)
    while len(kinds) < number:
        kinds += rng.sample(list(KINDS), len(KINDS))
    return [(share * (i + 1) + rng.randrange(-share // 3, share // 3), kind) for i, kind in enumerate(kinds[:number])]


def run_through(training: Training, faults: list[tuple[int, str]]) -> list[Struck]:
    """Strikes the run after those steps and waits each time until it trains again; nobody helps it."""
    struck = []
    for step, kind in faults:
        training.gate.close(after=step, attempt=_attempt(training) if struck else 0)
        training.wait_step(step)
        attempt, last, began = _attempt(training), training.steps()[-1], time.monotonic()
        KINDS[kind](training)
        training.gate.open()
        until(
            lambda attempt=attempt: _attempt(training) > attempt,
            timeout_s=400,
            what=f"{kind} to be over\n{training.logs()}",
        )
        struck.append(Struck(kind, last, time.monotonic() - began))
    return struck


def _attempt(training: Training) -> int:
    """Number of the attempt that did the newest step; an error once nothing would bring the run back."""
    now = training.now()
    assert now.state.active, f"{now}\n{training.logs()}"
    return int(training.lines("train")[-1]["attempt"])


def _any(pids: list[int]) -> int:
    return random.choice(pids)


def _executable(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    return ""


def _job(training: Training) -> str:
    job = training.now().job_id
    assert job is not None
    return job


def _nodes(training: Training) -> str:
    return _slurm(training, "squeue", "--noheader", "--format=%N", f"--jobs={_job(training)}").strip()


def _slurm(training: Training, *command: str) -> str:
    done = subprocess.run(command, env=training.environment, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout


def _resumed(training: Training, node: str) -> bool:
    """Slurm refuses while the node is still being cleaned up."""
    with contextlib.suppress(subprocess.CalledProcessError):
        _slurm(training, "scontrol", "update", f"NodeName={node}", "State=RESUME")
    return "State=DOWN" not in _slurm(training, "scontrol", "show", "node", node)
