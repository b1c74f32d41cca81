"""`jobs.jsonl`: a run's submissions, and how each incarnation of a job ended as its batch script saw it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from megabatch.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class Ending:
    """The last thing that a batch script did; missing when it was killed."""

    restart: int
    exit_code: int
    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One submission."""

    job_id: str
    time: float
    """When it was submitted, in seconds since the epoch."""
    cluster: str | None
    """Name of the cluster profile."""
    endings: tuple[Ending, ...] = ()
    """One for each incarnation that ended by itself, oldest first."""


def record_submission(run: RunDirectory, job_id: str, *, cluster: str | None = None) -> None:
    """Appends one line."""
    line = json.dumps({"job_id": job_id, "time": time.time(), "cluster": cluster})
    with open(run.jobs, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_records(run: RunDirectory) -> list[JobRecord]:
    """The run's submissions, oldest first; a line that a full disk cut short is left out."""
    records: dict[str, JobRecord] = {}
    for line in _lines(run):
        job_id = str(line["job_id"])
        if "exit_code" not in line:
            records[job_id] = JobRecord(job_id, float(line.get("time", 0)), line.get("cluster"))
        elif job_id in records:
            old = records[job_id]
            ending = Ending(int(line.get("restart", 0)), int(line["exit_code"]), float(line.get("time", 0)))
            records[job_id] = JobRecord(job_id, old.time, old.cluster, (*old.endings, ending))
    return list(records.values())


def _lines(run: RunDirectory) -> list[dict[str, Any]]:
    try:
        text = run.jobs.read_text(encoding="utf-8", errors="replace")
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
