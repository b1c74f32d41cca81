"""Submits a sweep's missing and failed runs, one array per job size."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from megabatch.entry.launch import Launch, provenance
from megabatch.errors import LaunchError
from megabatch.slurm.array import DEFAULT_MAX_SIZE, JobArray, grouped, limits, max_array_size, render_array
from megabatch.slurm.interrupts import held_back
from megabatch.slurm.queue import State
from megabatch.slurm.render import render
from megabatch.slurm.state import RunStatus, status_now
from megabatch.sweep.candidates import Candidate, Candidates
from megabatch.sweep.folder import array_folders, describe, write_runs


def left_alone(found: Candidates) -> dict[str, str]:
    """The points that need no submission: those whose run is done or in the queue, by name, with its state."""
    there = [candidate for candidate in found.kept if candidate.launch.directory.run_json.exists()]
    states = status_now(candidate.launch.directory.path for candidate in there)
    return {
        candidate.point.name: _describe(now)
        for candidate, now in zip(there, states, strict=True)
        if now.state.active or now.state is State.COMPLETED
    }


def _describe(now: RunStatus) -> str:
    job = f" as job {now.job_id}" if now.job_id and now.state.active else ""
    return f"{now.state}{job}" + (f" ({now.reason})" if now.state is State.RUNNING and now.reason else "")


def arrays_of(found: Candidates, wanted: Sequence[Candidate]) -> list[JobArray]:
    """The arrays of these points; chooses a folder for each, but does not make it yet."""
    jobs = [candidate.launch.job for candidate in wanted]
    if not jobs:
        return []
    name = found.base.recipe.resources.job_name or found.name
    # ask the cluster only if its answer could matter
    size = max_array_size() if len(jobs) > 1 else DEFAULT_MAX_SIZE
    groups = grouped(jobs, found.base.profile, max_size=size)
    parts = limits(found.max_parallel, [len(group) for group in groups])
    return [
        JobArray(name=name, folder=folder, jobs=tuple(jobs[i] for i in group), max_parallel=part)
        for folder, group, part in zip(array_folders(found.folder), groups, parts, strict=False)
    ]


def submit_arrays(found: Candidates, arrays: Sequence[JobArray], arguments: Sequence[str]) -> list[str]:
    """Writes the runs, then calls sbatch once for each array; returns the arrays' ids.

    Raises: ConfigError if a run's folder holds another run; LaunchError if sbatch refuses: we then remove the runs
    that are not queued, and the error names the queued arrays.
    """
    with held_back():
        return _submit_arrays(found, arrays, arguments)


def _submit_arrays(found: Candidates, arrays: Sequence[JobArray], arguments: Sequence[str]) -> list[str]:
    # importing submitit costs more than all the rest of a dry run
    from megabatch.slurm.submit import submit_array

    launches = launches_of(found, arrays)
    scripts = {launch.job.run_directory: render(launch.job, launch.profile) for launch in launches}
    written = write_runs(launches, list(scripts.values()), sweep_provenance(found, arguments))
    ids: list[str] = []
    code = found.base.code
    try:
        describe(found)
        if code is not None:
            code.store()
        for array in arrays:
            with _folder_of(array):
                own = [scripts[job.run_directory] for job in array.jobs]
                script = render_array(array, found.base.profile, scripts=own)
                ids.append(submit_array(array, script, cluster=found.base.cluster))
    except BaseException as error:
        written.take_away(also=() if ids or code is None else (code.path.parent,))
        if ids and isinstance(error, LaunchError):
            raise LaunchError(f"{error}; queued before that: {', '.join(ids)}") from error
        raise
    return ids


@contextmanager
def _folder_of(array: JobArray) -> Iterator[None]:
    """Makes the array's own folder; removes it if the body fails."""
    try:
        array.folder.mkdir(parents=True)
    except OSError as error:
        raise LaunchError(
            f"{array.folder} cannot be made: {error.strerror}; is someone submitting this sweep?"
        ) from error
    try:
        yield
    except BaseException:
        shutil.rmtree(array.folder, ignore_errors=True)
        with suppress(OSError):
            array.folder.parent.rmdir()
        raise


def launches_of(found: Candidates, arrays: Sequence[JobArray]) -> list[Launch]:
    """The launches of the arrays' runs, in their order."""
    by_folder = {candidate.launch.directory.path: candidate.launch for candidate in found.kept}
    return [by_folder[job.run_directory] for array in arrays for job in array.jobs]


def sweep_provenance(found: Candidates, arguments: Sequence[str]) -> dict[str, Any]:
    """Provenance as of any run; the values identify the point."""
    return {**provenance(found.base, arguments), "sweep": found.name}
