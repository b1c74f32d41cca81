"""Asking Slurm about jobs: squeue, then sacct, then scontrol, each once for all jobs that are still unknown.

squeue reports why a job waits and how often it was requeued, and is always current; accounting may be missing, but
remembers jobs that the controller has forgotten. We never use `--json`: its schema changes between Slurm versions.
"""

from __future__ import annotations

import enum
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable

from megabatch.values import dataclass

SOURCES = ("squeue", "sacct", "scontrol")
_PATIENCE_S = 20


class State(enum.StrEnum):
    """Slurm's state names where it has one, and ours."""

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
    """Slurm no longer knows the job, and the job left no record of its end."""

    @property
    def active(self) -> bool:
        """Whether Slurm runs it, or will run it without anyone's help."""
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


ENDING = "ending"
"""Our reason for a job that is over for Slurm but still has processes."""
_NO_REASON = ("None", "(null)", "NonZeroExitCode")
"""What Slurm writes where there is none, or where the exit code is all of it."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What one of Slurm's commands reports about a job."""

    state: State
    reason: str = ""
    """Why it waits, in Slurm's words; or `ENDING`."""
    exit_code: int | None = None
    restarts: int | None = None


class Daemon:
    """The controller or the accounting, with a limit on the total time that we wait for it."""

    def __init__(self) -> None:
        self._left_s: float = _PATIENCE_S

    def answer(self, *command: str) -> str:
        """Standard output; empty when the command is missing, fails or hangs: we then ask the next source."""
        configuration = os.environ.get("SLURM_CONF")
        if self._left_s <= 0 or (
            configuration and not os.path.exists(configuration)
        ):  # Slurm looks for a missing file for a minute
            return ""
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=self._left_s, check=False
            )
        except OSError:
            return ""
        except subprocess.TimeoutExpired:
            self._left_s = 0
            print(
                f"warning: {command[0]} did not answer within {_PATIENCE_S} s; using the runs' own files",
                file=sys.stderr,
            )
            return ""
        self._left_s -= time.monotonic() - begin
        return done.stdout if done.returncode == 0 else ""


def ask_slurm(job_ids: Iterable[str]) -> dict[str, tuple[str, JobState]]:
    """Source and state of each job that Slurm still knows; we wait only once for a daemon that hangs."""
    missing = set(job_ids)
    answers: dict[str, tuple[str, JobState]] = {}
    controller, accounting = Daemon(), Daemon()
    asked = ((_squeue, controller), (_sacct, accounting), (_scontrol, controller))
    for source, (ask, daemon) in zip(SOURCES, asked, strict=True):
        if not missing:
            break
        found = {job_id: state for job_id, state in ask(missing, daemon).items() if job_id in missing}
        answers |= {job_id: (source, state) for job_id, state in found.items()}
        missing -= found.keys()
    return answers


def _sacct(job_ids: set[str], accounting: Daemon) -> dict[str, JobState]:
    # Slurm does not find a waiting array element by its own id
    jobs = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
    command = ("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={jobs}")
    columns = "JobID,State,ExitCode"
    # older versions have no column for restarts
    text = accounting.answer(*command, f"--format={columns},Restarts") or accounting.answer(
        *command, f"--format={columns}"
    )
    found: dict[str, JobState | None] = {}
    for line in text.splitlines():
        job_id, state, exit_code, restarts = (*line.strip().split("|"), "", "", "")[:4]
        found |= dict.fromkeys(elements(job_id), _parse(state, exit_code=exit_code, restarts=restarts))
    return _known(found)


_SQUEUE_COLUMNS = {"JobArrayID": 40, "State": 24, "RestartCnt": 12, "exit_code": 12, "Reason": 60}


def _squeue(job_ids: set[str], controller: Daemon) -> dict[str, JobState]:
    columns = ",".join(f"{name}:{width}" for name, width in _SQUEUE_COLUMNS.items())
    text = controller.answer(
        "squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(sorted(job_ids))}", f"--Format={columns}"
    )
    found: dict[str, JobState | None] = {}
    for line in text.splitlines():
        words, start = [], 0
        for width in _SQUEUE_COLUMNS.values():
            words.append(line[start : start + width].strip())
            start += width
        job_id, state, restarts, exit_code, reason = words
        parsed = _parse(state, reason=reason, exit_code=exit_code, restarts=restarts)
        found |= dict.fromkeys(elements(job_id), parsed)
    return _known(found)


_SCONTROL_WORD = re.compile(r"(?:^|\s)(JobId|ArrayJobId|ArrayTaskId|JobState|Reason|ExitCode|Restarts)=(\S*)")
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def _scontrol(job_ids: set[str], controller: Daemon) -> dict[str, JobState]:
    one = next(iter(job_ids)) if len(job_ids) == 1 else ""
    text = controller.answer("scontrol", "--oneliner", "show", "job", *([one] if one else []))
    found: dict[str, JobState | None] = {}
    for line in text.splitlines():
        words: dict[str, str] = dict(_SCONTROL_WORD.findall(line))
        parsed = _parse(
            words.get("JobState", ""),
            reason=words.get("Reason", ""),
            exit_code=words.get("ExitCode", ""),
            restarts=words.get("Restarts", ""),
        )
        job_id = words.get("JobId", "")
        if "ArrayTaskId" in words:
            job_id = f"{words['ArrayJobId']}_[{words['ArrayTaskId']}]"
        found |= dict.fromkeys(elements(job_id), parsed)
    return _known(found)


def elements(job_id: str) -> list[str]:
    """The jobs behind an id: waiting elements of an array share one line, `123_[0,4-8:2%3]`."""
    array, bracket, tasks = job_id.partition("_[")
    if not bracket:
        return [job_id]
    found = []
    for part in tasks.rstrip("]").partition("%")[0].split(","):
        match = _RANGE.fullmatch(part)
        if match:
            first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            found += [f"{array}_{task}" for task in range(first, last + 1, step)]
    return found


def _known(found: dict[str, JobState | None]) -> dict[str, JobState]:
    return {job_id: state for job_id, state in found.items() if job_id and state is not None}


def _parse(state: str, *, reason: str = "", exit_code: str = "", restarts: str = "") -> JobState | None:
    """Parses one answer; None for an unknown state (`CANCELLED by 1000` and `CANCELLED+` count as cancelled)."""
    word = re.split(r"[ +]", state.strip(), maxsplit=1)[0].upper()
    known = _SPELLINGS.get(word)
    if known is None:
        return None
    if word == "COMPLETING":
        reason = ENDING
    return JobState(
        known,
        reason="" if reason in _NO_REASON else reason,
        exit_code=None if known.active else _exit_code(exit_code),
        restarts=int(restarts) if restarts.isdigit() else None,
    )


def _exit_code(text: str) -> int | None:
    """A shell's exit code from `3:0` (code 3), `0:15` (signal 15) or a raw wait status such as `768`."""
    code, colon, number = text.partition(":")
    if not code.isdigit():
        return None
    if colon:
        exit_, signal_ = int(code), int(number) if number.isdigit() else 0
    else:
        exit_, signal_ = int(code) >> 8, int(code) & 0x7F
    return 128 + signal_ if signal_ else exit_
