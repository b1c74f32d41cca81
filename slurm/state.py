"""The state of a run, from its heartbeat, Slurm or its own records."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.processes import has_ended, identity
from megabatch.slurm.queue import SOURCES, JobState, State, ask_slurm
from megabatch.slurm.records import LOCAL, JobRecord, read_records
from megabatch.values import dataclass

_BY_EXIT_CODE = {ExitCode.DONE.value: State.COMPLETED, ExitCode.REQUEUE.value: State.STOPPED}
_CANCELLED = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE TO ([A-Z ]+[A-Z]))?")
_BY_WORD = {
    "": State.CANCELLED,
    "TIME LIMIT": State.TIMEOUT,
    "PREEMPTION": State.PREEMPTED,
    "NODE FAILURE": State.NODE_FAIL,
}
_LAST_BYTES = 2**13
"""Of a batch log: srun says a line or two after slurmd's last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """What is known of a run."""

    run: Path
    state: State
    source: str
    """Who said so: `heartbeat`, `squeue`, `sacct`, `scontrol`, `records`, `process` (a local run's) or `nobody`."""
    job_id: str | None = None
    """The newest job's, or `local`; None before the first."""
    reason: str = ""
    """Why a pending job waits, in Slurm's words; or that a running one was cancelled, or is ending."""
    exit_code: int | None = None
    step: int | None = None
    """Optimizer steps done, from the heartbeat."""
    attempt: int | None = None
    """Number of the run's newest attempt, 0 first, or of the one that it waits for."""
    heartbeat_age_s: float | None = None
    heartbeat: Mapping[str, Any] = field(default_factory=dict)
    """All that `heartbeat.json` says, of whichever job."""
    jobs: Sequence[JobRecord] = ()
    """The run's jobs, oldest first."""


def status(runs: Iterable[Path], *, fresh_s: float = 60) -> list[RunStatus]:
    """The state of each run directory, in order; one call of each of Slurm's commands for all of them.

    Args: `fresh_s`: a heartbeat younger than this many seconds proves that its job runs; 0 always asks Slurm.
    """
    known = [_from_files(RunDirectory(Path(run)), fresh_s=fresh_s) for run in runs]
    answers = ask_slurm({job.job_id for found in known if isinstance(found, _Unsettled) for job in _open(found.jobs)})
    return [_settled(found, answers) if isinstance(found, _Unsettled) else found for found in known]


def status_now(runs: Iterable[Path]) -> list[RunStatus]:
    """`status` as it is before a run is submitted again: what a heartbeat says, which outlives a run that was killed,
    counts only where Slurm knows nothing of the job."""
    found = status(runs)
    asked = [one.run for one in found if one.state.active and one.source == "heartbeat"]
    known = {one.run: one for one in status(asked, fresh_s=0) if one.source in SOURCES}
    return [known.get(one.run, one) for one in found]


def active_jobs(run: Path) -> list[str]:
    """The run's jobs that wait or run, as Slurm says, in the order of submission: several for a run in links."""
    return active_jobs_of([run])[run]


def active_jobs_of(runs: Iterable[Path]) -> dict[Path, list[str]]:
    """The same of many runs, for one call of each of Slurm's commands."""
    jobs = {run: sorted(_open(read_records(RunDirectory(run))), key=lambda job: job.time) for run in runs}
    answers = ask_slurm(job.job_id for opened in jobs.values() for job in opened)
    return {run: [job.job_id for job in opened if _is_active(job, answers)] for run, opened in jobs.items()}


def read_heartbeat(run: RunDirectory) -> dict[str, Any]:
    """`heartbeat.json`: `time` (seconds since the epoch), `step`, `state`, `job_id`, `attempt`; empty without one."""
    try:
        value = json.loads(run.heartbeat.read_text(encoding="utf-8")) if run.heartbeat.is_file() else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A run whose newest job Slurm must be asked about."""

    run: RunDirectory
    jobs: list[JobRecord]
    beat: dict[str, Any]


def _from_files(run: RunDirectory, *, fresh_s: float) -> RunStatus | _Unsettled:
    jobs, beat = read_records(run), read_heartbeat(run)
    if not beat and not jobs:
        return RunStatus(run=run.path, state=State.NOT_SUBMITTED, source="nobody")
    found = _Unsettled(run, jobs, beat)
    if beat and _is_of_newest_job(beat, jobs):
        if beat.get("state") == "done":
            return _status(found, State.COMPLETED, "heartbeat", exit_code=ExitCode.DONE)
        ended = beat.get("state") in ("stopped", "failed") or _has_ended(jobs) or has_ended(_launcher(jobs))
        if not ended and abs(_age_s(beat)) < fresh_s:  # one of the future: a clock was set back
            return _status(found, State.RUNNING, "heartbeat")
    if jobs and jobs[-1].job_id != LOCAL:
        return found
    return _local(found)


def _has_ended(jobs: Sequence[JobRecord]) -> bool:
    """Whether the run's newest attempt has had its last word."""
    return bool(jobs and jobs[-1].starts and jobs[-1].ending_of(jobs[-1].starts[-1]))


def _is_of_newest_job(beat: Mapping[str, Any], jobs: Sequence[JobRecord]) -> bool:
    """A local rank knows no job."""
    said, newest = str(beat.get("job_id") or ""), jobs[-1] if jobs else None
    if newest is None or said == newest.job_id:
        return True
    began = newest.starts[-1].time if newest.starts else newest.time
    return not said and _number(beat, "time") >= began


def _local(found: _Unsettled) -> RunStatus:
    """A run without Slurm: its launcher's process, its records, else its last heartbeat."""
    if _has_ended(found.jobs):
        return _from_records(found)
    if local_launcher(found.jobs) is not None:
        return _status(found, State.RUNNING, "process")
    word = {"stopped": State.STOPPED, "failed": State.FAILED}.get(str(found.beat.get("state")), State.LOST)
    return _status(found, word, "heartbeat" if found.beat else "nobody")


def local_launcher(jobs: Sequence[JobRecord]) -> int | None:
    """The process that runs the newest attempt on this machine; None when there is none, or it runs elsewhere."""
    process = _launcher(jobs)
    number = process.split(":")[1] if process.count(":") == 2 else ""
    return int(number) if number.isdigit() and identity(int(number)) == process else None


def _launcher(jobs: Sequence[JobRecord]) -> str:
    """Which process runs, or ran, the newest attempt of a local run; empty where that is not known."""
    return jobs[-1].starts[-1].process if jobs and jobs[-1].job_id == LOCAL and jobs[-1].starts else ""


def _open(jobs: list[JobRecord]) -> list[JobRecord]:
    """The job that began last, and before it those that have not started: the links of a run wait for each other."""
    return [job for job in jobs if job.job_id != LOCAL and (job is jobs[-1] or not job.starts)]


def _current(jobs: list[JobRecord], answers: Mapping[str, tuple[str, JobState]]) -> JobRecord:
    """The job that tells the state of its run: the one that runs, else the next to run, else the last that ran."""
    active = [job for job in _open(jobs) if _is_active(job, answers)]
    return next((job for job in active if job.starts), active[0] if active else jobs[-1])


def _is_active(job: JobRecord, answers: Mapping[str, tuple[str, JobState]]) -> bool:
    return job.job_id in answers and answers[job.job_id][1].state.active


def _settled(found: _Unsettled, answers: Mapping[str, tuple[str, JobState]]) -> RunStatus:
    job = _current(found.jobs, answers)
    if job.job_id not in answers:
        return _from_records(found)
    source, said = answers[job.job_id]
    state = State.STOPPED if said.exit_code == ExitCode.REQUEUE and said.state is State.FAILED else said.state
    earlier = sum(len(record.starts) for record in found.jobs if record is not job)
    attempt = None if said.restarts is None else earlier + said.restarts
    return _status(found, state, source, job=job, reason=said.reason, exit_code=said.exit_code, attempt=attempt)


def _from_records(found: _Unsettled) -> RunStatus:
    """The batch script's last word, where Slurm knows nothing."""
    job = found.jobs[-1]
    if job.endings and (not job.starts or _has_ended(found.jobs)):
        ending = job.endings[-1]
        state = _BY_EXIT_CODE.get(ending.exit_code, State.FAILED)
        if (ending.cancelled or job.cancelled is not None) and state is not State.COMPLETED:
            state = State.CANCELLED
        return _status(found, state, "records", exit_code=ending.exit_code, attempt=ending.attempt)
    if job.cancelled is not None:
        return _status(found, State.CANCELLED, "records")
    if (word := _last_word_of_slurm(found.run, job)) is not None:
        return _status(found, word, "records")
    reason = "" if job.starts or found.beat else "not in the queue, and never started"
    return _status(found, State.LOST, "nobody", reason=reason)


def _last_word_of_slurm(run: RunDirectory, job: JobRecord) -> State | None:
    """How Slurm's daemons ended an attempt that could leave no ending, by the end of its batch log."""
    try:
        with open(run.batch_log(job.job_id), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LAST_BYTES))
            text = log.read().decode(errors="replace").rpartition("\nmegabatch: attempt ")[2]
    except OSError:
        return None
    words = _CANCELLED.findall(text)
    return _BY_WORD.get(words[-1]) if words else None


def _status(found: _Unsettled, state: State, source: str, *, job: JobRecord | None = None, **more: Any) -> RunStatus:
    job = job or (found.jobs[-1] if found.jobs else None)
    if state is State.RUNNING and job and job.cancelled is not None:
        more["reason"] = "cancelled, still saving"
    if more.get("attempt") is None:
        more["attempt"] = job.starts[-1].attempt if job and job.starts else found.beat.get("attempt")
    return RunStatus(
        run=found.run.path,
        state=state,
        source=source,
        job_id=job.job_id if job else None,
        step=found.beat.get("step"),
        heartbeat_age_s=max(0.0, _age_s(found.beat)) if found.beat else None,
        heartbeat=found.beat,
        jobs=found.jobs,
        **more,
    )


def _age_s(beat: Mapping[str, Any]) -> float:
    return time.time() - _number(beat, "time", float("-inf"))


def _number(beat: Mapping[str, Any], name: str, default: float = 0) -> float:
    value = beat.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else default
