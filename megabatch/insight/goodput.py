"""Goodput: the share of a run's allocated time that went into training.

Goodput is the time spent in steps of the final history, over the time for which GPUs were allocated:

    goodput = GPU-seconds in steps of the final history / allocated GPU-seconds

A step that was lost and repeated counts once, with its last time. The rest is starting, compiling, saving,
evaluating, lost steps, and waiting for dead peers. All GPUs of a run take part in every step and are allocated
together, so the number of GPUs cancels out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megabatch.slurm.records import JobRecord
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a run and the time for which it held its nodes."""

    job_id: str
    number: int
    """Number among the run's attempts, from 0."""
    nodes: str
    start: float
    """Seconds since the epoch."""
    end: float
    """The same; the current time for a running attempt, the last sign of life for a killed one."""
    exit_code: int | None
    """None for an attempt that runs or was killed."""


def attempts_of(
    jobs: Sequence[JobRecord], *, last_sign: Callable[[int], float], running: bool, now: float | None = None
) -> list[Attempt]:
    """Every attempt of a run, oldest first.

    Args: `last_sign`: gives the last sign of life of the attempt with that number, for one without an ending;
    `running`: whether the newest attempt still holds its nodes.
    """
    now = time.time() if now is None else now
    starts = sorted(((start, job) for job in jobs for start in job.starts), key=lambda pair: pair[0].time)
    found = []
    for index, (start, job) in enumerate(starts):
        ending, newest = job.ending_of(start), index == len(starts) - 1
        if ending is not None:
            end = ending.time
        elif newest:
            end = now if running else last_sign(start.attempt)
        else:
            # killed and restarted: it held its nodes until the restart at the latest
            end = min(starts[index + 1][0].time, last_sign(start.attempt))
        code = None if ending is None else ending.exit_code
        found.append(Attempt(job.job_id, start.attempt, start.nodes, start.time, max(end, start.time), code))
    return found


def allocated_s(attempts: Sequence[Attempt]) -> float:
    """Seconds for which the run held its nodes."""
    return sum(attempt.end - attempt.start for attempt in attempts)


def goodput(step: Mapping[str, Any], attempts: Sequence[Attempt]) -> float | None:
    """The ratio above, between 0 and 1; None before the first step. `step` is the newest line of `metrics.jsonl`."""
    useful, allocated = step.get("trained_s"), allocated_s(attempts)
    if not isinstance(useful, int | float) or allocated <= 0:
        return None
    return min(1.0, useful / allocated)


def remaining_s(step: Mapping[str, Any], *, train_iters: int, attempts: Sequence[Attempt]) -> float | None:
    """Seconds until the last step, across requeues: None before the first step.

    The remaining steps at the recent pace; for a run of several attempts, scaled by its overhead so far (waiting,
    starting and lost steps between its first attempt and now) per hour of steps.
    """
    left, done, pace = step.get("eta_s"), step.get("step"), step.get("trained_s")
    if not isinstance(left, int | float) or not isinstance(done, int) or not isinstance(pace, int | float):
        return None
    if done >= train_iters:
        return 0.0
    if len(attempts) < 2 or pace <= 0:
        return float(left)
    return float(left) * max(1.0, (attempts[-1].end - attempts[0].start) / pace)
