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
from megabatch.slurm.launcher_lock import launcher_lock
from megabatch.slurm.ownership import read_own, require_own
from megabatch.slurm.queue import State
from megabatch.slurm.records import LOCAL, read_records, record_cancellation
from megabatch.slurm.script.links import linked
from megabatch.slurm.state import RunStatus, active_jobs_of, local_launcher, status

_AT_ONCE = 1000
"""Maximum number of jobs per scancel call."""


def cancel(run: Path) -> str:
    """Cancels the run's jobs and returns their ids; the cluster's KillWait is the ranks' time to save.

    Raises: LaunchError when there is nothing to cancel or scancel refuses.
    """
    job_id = _newest_job(run)
    cancelled = cancel_all([run])
    if not cancelled:
        state = status([run], fresh_s=0)[0].state
        raise LaunchError(f"{run}: job {job_id} is not in the queue ({state}); nothing to cancel")
    return ", ".join(cancelled[run])


def cancel_all(runs: Sequence[Path]) -> dict[Path, list[str]]:
    """Cancels all waiting and running jobs of these runs: returns ids by run, in order. A local run is asked to stop.

    Raises: LaunchError when scancel is missing or refuses.
    """
    jobs = {run: ids for run, ids in active_jobs_of(runs).items() if ids}
    if jobs and shutil.which("scancel") is None:
        raise LaunchError("scancel not found: this machine has no Slurm; cancel from a login node")
    # cancel a run's later links first: a link that ends lets the next one start
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


def resume(run: Path, *, back_to: str | None = None) -> str:
    """Submits the run's stored script again and returns the new job's id; it resumes from the last checkpoint.

    If Slurm holds a requeued job until its old credential expires, we let that job start now instead.
    Args: back_to: the checkpoint to resume from instead; later ones are set aside.
    Raises: LaunchError when a job of the run is still in the queue otherwise, or there is no stored script;
    CheckpointError when there is no such checkpoint.
    """
    directory = RunDirectory(run)
    with _held(directory):
        return _resume(directory, back_to)


def resume_in_links(run: Path, links: int, *, back_to: str | None = None) -> tuple[str, ...]:
    """Submits the run in that many jobs, none of which requeues, and returns their ids; otherwise like `resume`.

    Raises: as `resume` does; then nothing is queued.
    """
    from megabatch.slurm.chain import ChainedJob, submit_all

    directory = RunDirectory(run)
    with _held(directory):
        _require_over(status([run], fresh_s=0)[0], may_be_done=back_to is not None)
        stored = stored_script(directory)
        _go_back(directory, back_to)
        job = ChainedJob(name=run.name, run=directory, script=linked(stored, directory), links=links)
        try:
            return submit_all([job], cluster=_cluster(directory))[job.name]
        except BaseException:
            write_atomic(directory.script, stored)
            raise


@contextmanager
def held_to_resume(run: Path, *, back_to: str | None = None) -> Iterator[RunDirectory]:
    """Holds the lock of a finished run, set to the checkpoint to resume from, for a caller that starts it here.

    Raises: as `resume` does.
    """
    directory = RunDirectory(run)
    with _held(directory):
        require_own(directory.path, directory.run_json)
        _require_over(status([run], fresh_s=0)[0], may_be_done=back_to is not None)
        _go_back(directory, back_to)
        yield directory


def is_local(run: Path) -> bool:
    """Whether the run was started on a machine without Slurm."""
    directory = RunDirectory(run)
    records = read_records(directory)
    return bool(records) and records[-1].job_id == LOCAL and not directory.script.exists()


@contextmanager
def _held(directory: RunDirectory) -> Iterator[None]:
    require_own(directory.path)
    try:
        with launcher_lock(directory):
            yield
    except OSError as error:
        raise LaunchError(
            f"{directory.path} cannot be written: {error.strerror or error}; free space, or resume it as its owner"
        ) from error


def _resume(directory: RunDirectory, back_to: str | None) -> str:
    # importing submitit costs more than all the rest of this package
    from megabatch.slurm.submit import submit

    run = directory.path
    now = status([run], fresh_s=0)[0]
    is_held = now.job_id and now.state is State.PENDING and now.reason == "BeginTime" and now.attempt
    if is_held and now.job_id and back_to is None:
        _start_now(now.job_id)
        return now.job_id
    _require_over(now, may_be_done=back_to is not None)
    script = stored_script(directory)
    _go_back(directory, back_to)
    return submit(directory, script, cluster=_cluster(directory)).job_id


def _go_back(directory: RunDirectory, back_to: str | None) -> None:
    """Sets a run that is over back to the checkpoint to resume from."""
    from megabatch.saved.history import go_back

    if back_to is not None:
        go_back(directory, back_to)


def _require_over(now: RunStatus, *, may_be_done: bool = False) -> None:
    """Raises: LaunchError for a run whose job has not ended, or whose training is complete."""
    if now.state is State.RUNNING and now.reason:
        raise LaunchError(f"{now.run}: job {now.job_id} is {now.reason}; resume it once it has ended")
    if now.state.active:
        raise LaunchError(f"{now.run}: job {now.job_id} is {now.state}; cancel it before resuming")
    if now.state is State.COMPLETED and now.source == "heartbeat" and not may_be_done:
        raise LaunchError(
            f"{now.run} is completed, at step {now.step}; there is nothing left to do (--from goes back to a step)"
        )


def stored_script(directory: RunDirectory) -> str:
    """The script that was submitted last.

    Raises: LaunchError when there is none, and for a script or a run that another user could have written.
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
    # a node refuses a credential issued in the same second in which it revoked the last one: the job would fail
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
