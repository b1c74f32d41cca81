"""Jobs that wait for each other: Slurm's dependencies, and a submission that queues all of them or none.

A run that may not requeue continues in links: N jobs of the same script, each starting if those before it have not
finished the run. Observed on a real Slurm 22.05: a job that requeues itself keeps its dependents waiting; a job that
can never start is cancelled, which counts as not ok for its dependents.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Literal

from megabatch.errors import LaunchError, MegabatchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.interrupts import held_back
from megabatch.values import dataclass

Kind = Literal["ok", "notok", "any"]
_TYPES: Mapping[Kind, str] = {"ok": "afterok", "notok": "afternotok", "any": "afterany"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainedJob:
    """One run of a chain, ready to be submitted."""

    name: str
    run: RunDirectory
    script: str
    after: tuple[tuple[Kind, str], ...] = ()
    """Names of other runs, each with the required ending: success, failure, or either."""
    singleton: bool = False
    """Start only when no other job of this user with this job name runs."""
    links: int = 1
    """Jobs of this same run, each continuing where the one before stopped."""


def submit_all(
    jobs: Sequence[ChainedJob], *, queued: Mapping[str, tuple[str, ...]] | None = None, cluster: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Queues the jobs, listed after their dependencies, and returns the ids of each one's links.

    Nothing starts before everything is queued. Args: `queued`: ids of runs already waiting or running, by name.
    Raises: LaunchError when Slurm refuses one of them; the ones submitted before it are then cancelled.
    """
    # importing submitit costs more than all the rest of this package
    from megabatch.slurm.submit import submit

    several = len(jobs) > 1 or any(job.links > 1 for job in jobs)
    before = dict(queued or {})
    new: dict[str, tuple[str, ...]] = {}
    held: list[str] = []
    with held_back():
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
    """Slurm's text for a job's dependencies; `links` are the earlier jobs of its own run.

    Of a run's links, the one that finishes the run succeeds, the ones before it fail, and later ones never start.
    Raises: LaunchError for what Slurm cannot express: "any of several jobs" together with another condition.
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
    """Cancels them, and reports it."""
    from megabatch.slurm.submit import scancel

    if not job_ids:
        return "nothing was queued"
    done = scancel(job_ids)
    named = f"job{'s' if len(job_ids) > 1 else ''} {', '.join(job_ids)}"
    if done.returncode:
        return f"{named} could not be cancelled ({done.stderr.strip()}); run: scancel {' '.join(job_ids)}"
    return f"{named}, submitted before it, {'were' if len(job_ids) > 1 else 'was'} cancelled"


def forbids_requeue(job_id: str) -> bool:
    """Whether Slurm refuses to requeue this job although we asked for it.

    `JobRequeue=0` in slurm.conf is only a default, which `--requeue` overrides; sites that enforce it change jobs at
    submission, and Slurm's own record of the job shows it.
    """
    try:
        done = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "Requeue=0" in done.stdout.split()
