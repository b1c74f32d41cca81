"""Cancelling and resuming a run by its directory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.records import read_records
from megabatch.slurm.state import active_jobs, status


def cancel(run: Path) -> str:
    """Cancels the run's jobs and returns their ids; ranks get the time to save that the cluster's KillWait gives.

    Raises: LaunchError when there is nothing to cancel or scancel refuses.
    """
    job_id = _newest_job(run)
    state = status([run], fresh_s=0)[0].state
    if not state.active:
        raise LaunchError(f"{run}: job {job_id} is not in the queue ({state}); nothing to cancel")
    if shutil.which("scancel") is None:
        raise LaunchError("scancel not found: this machine has no Slurm; cancel from a login node")
    # of a run in links the later jobs go first: a link that ends lets the next one start
    jobs = [*reversed(active_jobs(run))] or [job_id]
    for one in jobs:
        done = subprocess.run(["scancel", one], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LaunchError(f"scancel refused to cancel job {one}: {done.stderr.strip()}")
    return ", ".join(reversed(jobs))


def resume(run: Path) -> str:
    """Submits the run's stored script again and returns the new job's id; it goes on from the last checkpoint.

    Raises: LaunchError when a job of the run is still in the queue, or there is no stored script.
    """
    # submitit's import costs more than all the rest of this room
    from megabatch.slurm.submit import submit

    directory = RunDirectory(run)
    now = status([run], fresh_s=0)[0]
    if now.state.active:
        raise LaunchError(f"{run}: job {now.job_id} is {now.state}; cancel it before resuming")
    try:
        script = directory.script.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise LaunchError(f"{run}: no stored job script ({error}); submit its recipe instead") from error
    records = read_records(directory)
    return submit(directory, script, cluster=records[-1].cluster if records else None).job_id


def _newest_job(run: Path) -> str:
    records = read_records(RunDirectory(run))
    if not records:
        raise LaunchError(f"{run}: no job was submitted from this run directory")
    return records[-1].job_id
