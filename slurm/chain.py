"""Jobs that wait for each other: Slurm's dependencies, and a submission that queues all of them or none.

A run that may not requeue goes on in links: N jobs of the same script, each starting when those before it have not
finished the run. What Slurm 22.05 does, seen on a real one: a job that requeues itself keeps its dependents waiting; a
job that can never start is cancelled, which counts as not ok for those that wait for it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megabatch.errors import LaunchError, MegabatchError
from megabatch.run_directory import RunDirectory

Kind = Literal["ok", "notok", "any"]
_TYPES: Mapping[Kind, str] = {"ok": "afterok", "notok": "afternotok", "any": "afterany"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainedJob:
    """One run of a chain, ready to be submitted."""

    name: str
    run: RunDirectory
    script: str
    after: tuple[tuple[Kind, str], ...] = ()
    """Names of other runs, each with how it must have ended: well, not well, or either."""
    singleton: bool = False
    """Starts when no other job of this user with this job name runs."""
    links: int = 1
    """Jobs of this same run, each going on where the one before was stopped."""


def submit_all(
    jobs: Sequence[ChainedJob], *, queued: Mapping[str, tuple[str, ...]] | None = None, cluster: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Queues the jobs, which come after all that they wait for, and returns the ids of each one's links.

    Nothing starts before everything is queued. Args: `queued`: ids of runs that wait or run already, by name.
    Raises: LaunchError when Slurm refuses one of them; those submitted before it are cancelled then.
    """
    # submitit's import costs more than all the rest of this room
    from megabatch.slurm.submit import submit

    several = len(jobs) > 1 or any(job.links > 1 for job in jobs)
    before = dict(queued or {})
    new: dict[str, tuple[str, ...]] = {}
    held: list[str] = []
    try:
        for job in jobs:
            for _ in range(job.links):
                earlier = new.setdefault(job.name, ())
                free = not earlier and not any(name in new for _, name in job.after)
                job_id = submit(
                    job.run,
                    job.script,
                    cluster=cluster,
                    dependency=dependency(job, ids=before | new, links=earlier),
                    hold=several and free,
                ).job_id
                new[job.name] = (*earlier, job_id)
                held += [job_id] if several and free else []
        _release(held)
    except BaseException as error:
        ids = [job_id for links in new.values() for job_id in links]
        if isinstance(error, MegabatchError) and ids:
            raise LaunchError(f"{job.name}: {error}; {_cancelled(ids)}") from error
        _cancelled(ids)
        raise
    return new


def dependency(job: ChainedJob, *, ids: Mapping[str, tuple[str, ...]], links: Sequence[str] = ()) -> str | None:
    """Slurm's text for what a job waits for; `links` are the earlier jobs of its own run.

    Of a run in several links the one that finishes it ends well, those before it do not, and later ones never start.
    Raises: LaunchError for what Slurm cannot say: one of several jobs, and something else besides.
    """
    either = [name for kind, name in job.after if kind == "ok" and len(ids[name]) > 1]
    if either and (len(job.after) > 1 or job.singleton or job.links > 1):
        raise LaunchError(
            f"{job.name} cannot wait for anything but {either[0]}, which has {len(ids[either[0]])} links"
        )
    if either:
        return "?".join(f"afterok:{job_id}" for job_id in ids[either[0]])
    words = [f"{_TYPES[kind]}:{job_id}" for kind, name in job.after for job_id in ids[name]]
    words += [f"afternotok:{job_id}" for job_id in links]
    return ",".join(words + (["singleton"] if job.singleton else [])) or None


def _release(job_ids: list[str]) -> None:
    if job_ids:
        done = subprocess.run(["scontrol", "release", ",".join(job_ids)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LaunchError(f"Slurm did not release jobs {', '.join(job_ids)}: {done.stderr.strip()}")


def _cancelled(job_ids: list[str]) -> str:
    """Cancels them, and says so."""
    if not job_ids:
        return "nothing was queued"
    done = subprocess.run(["scancel", *job_ids], capture_output=True, text=True, check=False)
    named = f"job{'s' if len(job_ids) > 1 else ''} {', '.join(job_ids)}"
    if done.returncode:
        return f"{named} could not be cancelled ({done.stderr.strip()}); run: scancel {' '.join(job_ids)}"
    return f"{named}, submitted before it, {'were' if len(job_ids) > 1 else 'was'} cancelled"


def forbids_requeue(job_id: str) -> bool:
    """Whether Slurm will not take this job back into the queue, although it was asked to.

    `JobRequeue=0` in slurm.conf is only a default, which `--requeue` overrides; sites that mean it change jobs as they
    are submitted, and Slurm's own record of the job shows it.
    """
    try:
        done = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "Requeue=0" in done.stdout.split()
