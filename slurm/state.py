"""What became of a run: its heartbeat says, else Slurm, else the run's own records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.queue import JobState, State, ask_slurm
from megabatch.slurm.records import JobRecord, read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What is known of a run."""

    run: Path
    state: State
    source: str
    """Who said so: `heartbeat`, `sacct`, `squeue`, `scontrol`, `records` or `nobody`."""
    job_id: str | None = None
    reason: str = ""
    """Why a pending job waits, in Slurm's words."""
    exit_code: int | None = None
    step: int | None = None
    """Optimizer steps done, from the heartbeat."""
    restart: int | None = None
    heartbeat_age_s: float | None = None


def status(runs: Iterable[Path], *, fresh_s: float = 60) -> list[RunStatus]:
    """The state of each run directory, in order; one call of each of Slurm's commands for all of them.

    Args: `fresh_s`: a heartbeat younger than this many seconds proves that its job runs; 0 always asks Slurm.
    """
    directories = [RunDirectory(Path(run)) for run in runs]
    records = [read_records(directory) for directory in directories]
    beats = [read_heartbeat(directory) for directory in directories]
    known: list[RunStatus | None] = [
        _from_heartbeat(directory, job_records, beat, fresh_s=fresh_s)
        for directory, job_records, beat in zip(directories, records, beats, strict=True)
    ]
    asked = {job.job_id for rs, found in zip(records, known, strict=True) if found is None for job in _open(rs)}
    answers = ask_slurm(asked)
    return [
        found if found is not None else _from_slurm(directory, job_records, beat, answers)
        for found, directory, job_records, beat in zip(known, directories, records, beats, strict=True)
    ]


def active_jobs(run: Path) -> list[str]:
    """The run's jobs that wait or run, as Slurm says: several for a run in links."""
    jobs = _open(read_records(RunDirectory(run)))
    answers = ask_slurm(job.job_id for job in jobs)
    return [job.job_id for job in jobs if _is_active(job, answers)]


def read_heartbeat(run: RunDirectory) -> dict[str, Any]:
    """`heartbeat.json`: `time` (seconds since the epoch), `step`, `state`, `job_id`, `restart`; empty without one."""
    try:
        value = json.loads(run.heartbeat.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _from_heartbeat(
    run: RunDirectory, records: list[JobRecord], beat: dict[str, Any], *, fresh_s: float
) -> RunStatus | None:
    if not beat and not records:
        return RunStatus(run=run.path, state=State.NOT_SUBMITTED, source="nobody")
    job_id = records[-1].job_id if records else None
    of_this_job = bool(beat) and str(beat.get("job_id") or "") in ("", job_id)
    if of_this_job and beat.get("state") == "done":
        return _status(run, State.COMPLETED, "heartbeat", job_id, beat, exit_code=ExitCode.DONE)
    if of_this_job and beat.get("state") not in ("stopped", "failed") and _age_s(beat) < fresh_s:
        return _status(run, State.RUNNING, "heartbeat", job_id, beat)
    if records:
        return None
    word = {"stopped": State.STOPPED, "failed": State.FAILED}.get(str(beat.get("state")), State.LOST)
    return _status(run, word, "heartbeat", job_id, beat)


def _from_slurm(
    run: RunDirectory, records: list[JobRecord], beat: dict[str, Any], answers: Mapping[str, tuple[str, JobState]]
) -> RunStatus:
    job = _current(records, answers)
    if job.job_id in answers:
        source, said = answers[job.job_id]
        state = State.STOPPED if said.exit_code == ExitCode.REQUEUE and said.state is State.FAILED else said.state
        more = {"reason": said.reason, "exit_code": said.exit_code}
        return _status(run, state, source, job.job_id, beat, restart=said.restarts, **more)
    if not job.endings:
        return _status(run, State.LOST, "nobody", job.job_id, beat)
    code = job.endings[-1].exit_code
    state = {ExitCode.DONE.value: State.COMPLETED, ExitCode.REQUEUE.value: State.STOPPED}.get(code, State.FAILED)
    return _status(run, state, "records", job.job_id, beat, exit_code=code, restart=job.endings[-1].restart)


def _open(records: list[JobRecord]) -> list[JobRecord]:
    """The job that began last, and before it those that have not started: the links of a run wait for each other."""
    return [job for job in records if job is records[-1] or not job.starts]


def _current(records: list[JobRecord], answers: Mapping[str, tuple[str, JobState]]) -> JobRecord:
    """Of a run's jobs the one that tells its state: the one that runs, else the next to run, else the last that ran."""
    active = [job for job in _open(records) if _is_active(job, answers)]
    return next((job for job in active if job.starts), active[0] if active else records[-1])


def _is_active(job: JobRecord, answers: Mapping[str, tuple[str, JobState]]) -> bool:
    return job.job_id in answers and answers[job.job_id][1].state.active


def _status(
    run: RunDirectory, state: State, source: str, job_id: str | None, beat: dict[str, Any], **more: Any
) -> RunStatus:
    if more.get("restart") is None:
        more["restart"] = beat.get("restart")
    age = _age_s(beat) if beat else None
    return RunStatus(
        run=run.path, state=state, source=source, job_id=job_id, step=beat.get("step"), heartbeat_age_s=age, **more
    )


def _age_s(beat: dict[str, Any]) -> float:
    try:
        return time.time() - float(beat["time"])
    except (KeyError, TypeError, ValueError):
        return float("inf")
