"""Runs one run locally, with a stop, a kill and resumes."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megabatch.rehearse.compare import records
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local import run_local
from megabatch.slurm.processes import tagged_processes


def uninterrupted(job: JobSpec) -> int:
    """Exit code of the run from its first step to its last."""
    return run_local(job, terminal=io.BytesIO())


def stopped(job: JobSpec, *, step: int) -> int:
    """Asks the run to save and stop after that step, as a time limit or preemption would."""
    return _with(job, step, lambda: os.kill(os.getpid(), signal.SIGUSR2))


def killed(job: JobSpec, *, step: int, rank: int) -> int:
    """Kills a rank after that step, as a machine that runs out of memory would."""

    def kill() -> None:
        for pid in tagged_processes(f"MEGABATCH_RUN={job.run_directory}", also=f"RANK={rank}"):
            if _environment(pid).get("RANK") == str(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    return _with(job, step, kill)


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(word.partition("=")[::2] for word in words)
    return {}


def _with(job: JobSpec, step: int, disturb: Callable[[], None]) -> int:
    """Continues the run, and interrupts it once metrics.jsonl has that step."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if max(records(job.files, "train"), default=0) >= step:
                disturb()
                return
            time.sleep(0.01)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        return run_local(job, terminal=io.BytesIO())
    finally:
        over.set()
        watching.join()


def moments(steps: int, *, ranks: int, seed: int) -> tuple[int, int, int]:
    """Random: the step to stop after, a later one to kill at, and the rank to kill.

    Both lie in the first half: small steps are so short that several finish before a signal arrives.
    """
    rng = random.Random(seed)
    stop = rng.randint(1, steps // 4)
    return stop, rng.randint(stop + 2, steps // 2), rng.randrange(ranks)


ENDINGS = {ExitCode.DONE: "done", ExitCode.REQUEUE: "stopped and saved", 137: "killed"}
