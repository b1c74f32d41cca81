"""Cancelling and resuming a run by its directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.slurm.alone import alone
from megabatch.slurm.ownership import read_own, require_own
from megabatch.slurm.queue import State
from megabatch.slurm.records import LOCAL, read_records, record_cancellation
from megabatch.slurm.script.links import linked
from megabatch.slurm.state import RunStatus, active_jobs_of, local_launcher, status

_AT_ONCE = 1000
"""Jobs that one scancel gets."""


def cancel(run: Path) -> str:
    """Cancels the run's jobs and returns their ids; ranks get the time to save that the cluster's KillWait gives.

    Raises: LaunchError when there is nothing to cancel or scancel refuses.
    """
    job_id = _newest_job(run)
    cancelled = cancel_all([run])
    if not cancelled:
        state = status([run], fresh_s=0)[0].state
        raise LaunchError(f"{run}: job {job_id} is not in the queue ({state}); nothing to cancel")
    return ", ".join(cancelled[run])


def cancel_all(runs: Sequence[Path]) -> dict[Path, list[str]]:
    """Cancels what waits or runs of these runs: ids by run, in the order of their turn. A local run is asked to stop.

    Raises: LaunchError when scancel is missing or refuses.
    """
    jobs = {run: ids for run, ids in active_jobs_of(runs).items() if ids}
    if jobs and shutil.which("scancel") is None:
        raise LaunchError("scancel not found: this machine has no Slurm; cancel from a login node")
    # of a run in links the later jobs go first: a link that ends lets the next one start
    for turn in range(max(map(len, jobs.values()), default=0), 0, -1):
        _scancel([ids[turn - 1] for ids in jobs.values() if len(ids) >= turn])
    for run, ids in jobs.items():
        for one in ids:
            record_cancellation(RunDirectory(run), one)
    return jobs | {run: [LOCAL] for run in runs if run not in jobs and _stop_local(run)}


def _scancel(jobs: Sequence[str]) -> None:
    for first in range(0, len(jobs), _AT_ONCE):
        some = jobs[first : first + _AT_ONCE]
        done = subprocess.run(["scancel", *some], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LaunchError(f"scancel refused to cancel {', '.join(some[:8])}: {done.stderr.strip()}")


def _stop_local(run: Path) -> bool:
    """Asks the launcher of a local run to stop, as Ctrl-C does; False when there is none on this machine."""
    pid = local_launcher(read_records(RunDirectory(run)))
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    return True


def resume(run: Path) -> str:
    """Submits the run's stored script again and returns the new job's id; it goes on from the last checkpoint.

    A job that was requeued, and that Slurm holds until its old credential has expired, may start now instead.
    Raises: LaunchError when a job of the run is still in the queue otherwise, or there is no stored script.
    """
    directory = RunDirectory(run)
    with _held(directory):
        return _resume(directory)


def resume_in_links(run: Path, links: int) -> tuple[str, ...]:
    """Submits the run in that many jobs, none of which requeues, and returns their ids; `resume` in all else.

    Raises: LaunchError as `resume` does; nothing is queued then.
    """
    from megabatch.slurm.chain import ChainedJob, submit_all

    directory = RunDirectory(run)
    with _held(directory):
        now = status([run], fresh_s=0)[0]
        _require_over(now)
        stored = stored_script(directory)
        job = ChainedJob(name=run.name, run=directory, script=linked(stored, directory), links=links)
        try:
            return submit_all([job], cluster=_cluster(directory))[job.name]
        except BaseException:
            write_atomic(directory.script, stored)
            raise


@contextmanager
def _held(directory: RunDirectory) -> Iterator[None]:
    try:
        with alone(directory):
            yield
    except OSError as error:
        raise LaunchError(
            f"{directory.path} cannot be written: {error.strerror or error}; free space, or resume it as its owner"
        ) from error


def _resume(directory: RunDirectory) -> str:
    # submitit's import costs more than all the rest of this room
    from megabatch.slurm.submit import submit

    run = directory.path
    now = status([run], fresh_s=0)[0]
    if now.job_id and now.state is State.PENDING and now.reason == "BeginTime" and now.restart:
        _start_now(now.job_id)
        return now.job_id
    _require_over(now)
    return submit(directory, stored_script(directory), cluster=_cluster(directory)).job_id


def _require_over(now: RunStatus) -> None:
    """Raises: LaunchError for a run whose job has not ended, or that has trained to its end."""
    if now.state is State.RUNNING and now.reason:
        raise LaunchError(f"{now.run}: job {now.job_id} is {now.reason}; resume it once it has ended")
    if now.state.active:
        raise LaunchError(f"{now.run}: job {now.job_id} is {now.state}; cancel it before resuming")
    if now.state is State.COMPLETED and now.source == "heartbeat":
        raise LaunchError(f"{now.run} is completed, at step {now.step}; there is nothing to go on with")


def stored_script(directory: RunDirectory) -> str:
    """What was submitted last.

    Raises: LaunchError when there is nothing, and for a script or a run that somebody else could have written.
    """
    require_own(directory.path, directory.run_json)
    try:
        return read_own(directory.script).decode(errors="surrogateescape")
    except OSError as error:
        raise LaunchError(f"{directory.path}: no stored job script ({error}); submit its recipe instead") from error


def _cluster(directory: RunDirectory) -> str | None:
    records = read_records(directory)
    return records[-1].cluster if records else None


def _start_now(job_id: str) -> None:
    # a node refuses a credential of the very second in which it revoked the last one: the job would fail at once
    done = subprocess.run(
        ["scontrol", "update", f"JobId={job_id}", "StartTime=now+1"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LaunchError(f"scontrol refused to start job {job_id} now: {done.stderr.strip()}")


def _newest_job(run: Path) -> str:
    records = read_records(RunDirectory(run))
    if not records:
        raise LaunchError(f"{run}: no job was submitted from this run directory")
    return records[-1].job_id
