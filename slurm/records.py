"""`jobs.jsonl`: a run's submissions, and how each attempt started and ended as its batch script saw it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megabatch.run_directory import RunDirectory
from megabatch.values import dataclass

_LARGEST = 1e300
"""Of a number that a line may say; JSON as Python reads it also has infinities."""
LOCAL = "local"
"""Stands for a job id where ranks ran without Slurm."""


@dataclass(frozen=True, slots=True)
class Start:
    """An attempt's start, the first thing that its batch script, or the local launcher, records."""

    attempt: int
    """Its number among the run's attempts, from 0; log names contain it."""
    time: float
    """Seconds since the epoch."""
    nodes: str = ""
    """Slurm's node list (`n[1-2]`), or this machine's name."""
    process: str = ""
    """The local launcher's process, as `megabatch.slurm.processes.identity` gives it."""


@dataclass(frozen=True, slots=True)
class Ending:
    """An attempt's end, the last thing that its batch script records; missing when it was killed."""

    attempt: int
    exit_code: int
    time: float
    """Seconds since the epoch."""
    cancelled: bool = False
    """Whether someone cancelled the job; it may still have saved."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One submission; all local attempts of a run form one record."""

    job_id: str
    """Slurm's id (`123_4` for an array element), or `LOCAL`."""
    time: float
    """Time of submission, in seconds since the epoch."""
    cluster: str | None = None
    """Name of the cluster profile."""
    starts: tuple[Start, ...] = ()
    """Oldest first."""
    endings: tuple[Ending, ...] = ()
    """One per attempt that ended by itself, oldest first."""
    cancelled: float | None = None
    """When `megabatch cancel` ended it; needed because Slurm at once forgets an array element that never started."""

    def ending_of(self, start: Start) -> Ending | None:
        """None while it runs, and if it was killed."""
        return next((ending for ending in self.endings if ending.attempt == start.attempt), None)


def record_submission(run: RunDirectory, job_id: str, *, cluster: str | None = None) -> None:
    """Appends one line."""
    _append(run, {"job_id": job_id, "time": time.time(), "cluster": cluster})


def record_cancellation(run: RunDirectory, job_id: str) -> None:
    """Appends one line."""
    _append(run, {"job_id": job_id, "cancelled": time.time()})


def record_start(run: RunDirectory, start: Start) -> None:
    """Appends the line of a local attempt's start."""
    line: dict[str, Any] = {"job_id": LOCAL, "attempt": start.attempt, "start": start.time, "nodes": start.nodes}
    _append(run, line | {"process": start.process})


def record_ending(run: RunDirectory, ending: Ending) -> None:
    """Appends the line of a local attempt's ending."""
    line: dict[str, Any] = {"job_id": LOCAL, "attempt": ending.attempt, "exit_code": ending.exit_code}
    _append(run, line | {"time": ending.time})


def read_records(run: RunDirectory) -> list[JobRecord]:
    """The run's jobs, the one that began last at the end; skips a line that a full disk cut short."""
    records: dict[str, JobRecord] = {}
    for line in _lines(run):
        job_id = str(line["job_id"])
        # a job may start before we record its submission
        old = records.get(job_id) or JobRecord(job_id, _number(line, "start", _number(line, "time")))
        if "exit_code" in line:
            ending = Ending(
                int(_number(line, "attempt")),
                int(_number(line, "exit_code")),
                _number(line, "time"),
                cancelled=line.get("cancelled") is True,
            )
            records[job_id] = replace(old, endings=(*old.endings, ending))
            continue
        if "cancelled" in line:
            records[job_id] = replace(old, cancelled=_number(line, "cancelled"))
            continue
        records.pop(job_id, None)
        if "start" in line:
            words = {name: str(line.get(name) or "") for name in ("nodes", "process")}
            start = Start(int(_number(line, "attempt")), _number(line, "start"), **words)
            records[job_id] = replace(old, starts=(*old.starts, start))
        else:
            records[job_id] = replace(old, time=_number(line, "time"), cluster=line.get("cluster"))
    return list(records.values())


def next_attempt(run: RunDirectory) -> int:
    """The number of the run's next attempt; the batch script counts the same lines."""
    return sum("start" in line for line in _lines(run))


def _append(run: RunDirectory, line: Mapping[str, Any]) -> None:
    with open(run.jobs, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _lines(run: RunDirectory) -> list[dict[str, Any]]:
    try:
        text = run.jobs.read_text(encoding="utf-8", errors="replace") if run.jobs.is_file() else ""
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "job_id" in value:
            lines.append(value)
    return lines


def _number(line: Mapping[str, Any], name: str, default: float = 0) -> float:
    value = line.get(name, default)
    return float(value) if isinstance(value, int | float) and abs(value) < _LARGEST else default
