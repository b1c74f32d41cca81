"""Asking Slurm about jobs: sacct, then squeue, then scontrol, each once for all jobs.

Accounting may be missing and Slurm may have forgotten a job. `--json` is never used: its form changes with Slurm's
version.
"""

from __future__ import annotations

import enum
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_TIMEOUT_S = 20


class State(enum.StrEnum):
    """Slurm's words where it has one, and ours."""

    NOT_SUBMITTED = enum.auto()
    PENDING = enum.auto()
    RUNNING = enum.auto()
    COMPLETED = enum.auto()
    STOPPED = enum.auto()
    """Saved on request and not in the queue: `resume` continues it."""
    FAILED = enum.auto()
    CANCELLED = enum.auto()
    TIMEOUT = enum.auto()
    PREEMPTED = enum.auto()
    NODE_FAIL = enum.auto()
    OUT_OF_MEMORY = enum.auto()
    LOST = enum.auto()
    """Slurm does not know the job any more, and it left no word."""

    @property
    def active(self) -> bool:
        """Whether Slurm will still run it without anyone's help."""
        return self in (State.PENDING, State.RUNNING)


_SPELLINGS = {
    "CONFIGURING": State.PENDING,
    "REQUEUED": State.PENDING,
    "REQUEUE_HOLD": State.PENDING,
    "REQUEUE_FED": State.PENDING,
    "SPECIAL_EXIT": State.PENDING,
    "SUSPENDED": State.PENDING,
    "RESV_DEL_HOLD": State.PENDING,
    "COMPLETING": State.RUNNING,
    "RESIZING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "STOPPED": State.PENDING,
    "BOOT_FAIL": State.NODE_FAIL,
    "DEADLINE": State.TIMEOUT,
    "REVOKED": State.CANCELLED,
} | {state.name: state for state in State if state.name not in ("STOPPED", "LOST", "NOT_SUBMITTED")}


@dataclass(frozen=True, slots=True)
class JobState:
    """What one of Slurm's commands says of a job."""

    state: State
    reason: str = ""
    exit_code: int | None = None
    restarts: int | None = None


def ask_slurm(job_ids: Iterable[str]) -> dict[str, tuple[str, JobState]]:
    """Who answered, and what, for each job that Slurm still knows.

    squeue goes over sacct for a job that it calls active: accounting lags behind a requeue.
    """
    missing = set(job_ids)
    answers: dict[str, tuple[str, JobState]] = {}
    for source, ask in (("sacct", _sacct), ("squeue", _squeue), ("scontrol", _scontrol)):
        if not missing:
            break
        found = {job_id: state for job_id, state in ask(missing).items() if job_id in missing}
        answers |= {job_id: (source, state) for job_id, state in found.items()}
        missing -= found.keys()
    return answers


def _sacct(job_ids: set[str]) -> dict[str, JobState]:
    form = "JobID,State,ExitCode,Restarts"
    jobs = ",".join(sorted(job_ids))
    text = _output("sacct", "--allocations", "--noheader", "--parsable2", f"--format={form}", f"--jobs={jobs}")
    if not text:  # before Slurm 23.11 there is no column of restarts
        form = form.removesuffix(",Restarts")
        text = _output("sacct", "--allocations", "--noheader", "--parsable2", f"--format={form}", f"--jobs={jobs}")
    return _rows(text, lambda id_, state, exit_="", restarts="": (id_, state, "", exit_, restarts))


def _squeue(job_ids: set[str]) -> dict[str, JobState]:
    jobs = ",".join(sorted(job_ids))
    text = _output("squeue", "--noheader", "--states=all", f"--jobs={jobs}", "--format=%i|%T|%r")
    return _rows(text, lambda id_, state, reason="": (id_, state, reason, "", ""))


def _scontrol(job_ids: set[str]) -> dict[str, JobState]:
    one = next(iter(job_ids)) if len(job_ids) == 1 else ""
    text = _output("scontrol", "--oneliner", "show", "job", *([one] if one else []))
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        words = dict(re.findall(r"(?:^|\s)(JobId|JobState|Reason|ExitCode|Restarts)=(\S*)", line))
        state = _parse(
            words.get("JobState", ""), words.get("Reason", ""), words.get("ExitCode", ""), words.get("Restarts", "")
        )
        if state is not None and "JobId" in words:
            found[words["JobId"]] = state
    return found


def _rows(text: str, pick: Callable[..., tuple[str, str, str, str, str]]) -> dict[str, JobState]:
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        columns = line.strip().split("|")
        if len(columns) >= 2:
            job_id, *rest = pick(*columns)
            state = _parse(*rest)
            if state is not None:
                found[job_id] = state
    return found


def _parse(state: str, reason: str, exit_code: str, restarts: str) -> JobState | None:
    """`CANCELLED by 1000` and `CANCELLED+` are cancelled; `9:0` is exit code 9, `0:15` ended by signal 15."""
    known = _SPELLINGS.get(re.split(r"[ +]", state.strip(), maxsplit=1)[0].upper())
    if known is None:
        return None
    code, _, signal_ = exit_code.partition(":")
    number = 128 + int(signal_) if signal_.isdigit() and int(signal_) else int(code) if code.isdigit() else None
    reason = "" if reason in ("None", "(null)") else reason
    return JobState(known, reason, None if known.active else number, int(restarts) if restarts.isdigit() else None)


def _output(*command: str) -> str:
    """Standard output; empty when the command is missing, fails or hangs: the next source is asked then."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
