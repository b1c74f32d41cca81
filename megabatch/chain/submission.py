"""Submits a chain's steps to Slurm, all or none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megabatch.chain.ready import ReadyChain
from megabatch.chain.record import to_run, write_record
from megabatch.chain.step import ReadyStep
from megabatch.entry.launch import written
from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.chain import ChainedJob, submit_all
from megabatch.slurm.interrupts import held_back
from megabatch.slurm.launcher_lock import launcher_lock
from megabatch.slurm.ownership import require_own
from megabatch.slurm.state import active_jobs


def submit_chain(ready: ReadyChain, arguments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Queues missing and failed steps and their dependents; returns the new jobs' ids by step.

    Raises: ConfigError, LaunchError; then nothing is queued, and the folders that we made are removed.
    """
    with held_back(), _held(ready):
        return _submit(ready, to_run(ready), arguments)


def _submit(ready: ReadyChain, again: Sequence[ReadyStep], arguments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    if not again:
        return {}
    names = {one.step.name for one in again}
    waiting = {one.step.name: tuple(active_jobs(one.job.run_directory)) for one in ready.steps}
    queued = {name: ids for name, ids in waiting.items() if ids and name not in names}
    jobs = [_job(ready, one, waits_for=names | queued.keys()) for one in again]
    with ExitStack() as stack:
        for one in again:
            stack.enter_context(written_step(one, arguments))
        if ready.code is not None:
            ready.code.store()
        ids = submit_all(jobs, queued=queued, cluster=ready.cluster)
    write_record(ready)
    return ids


@contextmanager
def _held(ready: ReadyChain) -> Iterator[None]:
    """Locks the chain's folder for this launcher; removes it at the end if it has no steps."""
    made = not ready.folder.exists()
    try:
        ready.folder.mkdir(parents=True, exist_ok=True)
        with launcher_lock(RunDirectory(ready.folder)):
            try:
                yield
            finally:
                if made and not any((ready.folder / one.step.name).exists() for one in ready.steps):
                    shutil.rmtree(ready.folder, ignore_errors=True)
    except OSError as error:
        raise LaunchError(f"{ready.folder} cannot be written: {error.strerror or error}; choose another") from error


def _job(ready: ReadyChain, one: ReadyStep, *, waits_for: set[str]) -> ChainedJob:
    """Leaves out conditions on ended steps: they hold, or the step would not be queued."""
    return ChainedJob(
        name=one.step.name,
        run=one.job.files,
        script=ready.script(one),
        after=tuple(
            (edge.kind, edge.step) for edge in one.step.after if edge.kind != "singleton" and edge.step in waits_for
        ),
        singleton=any(edge.kind == "singleton" for edge in one.step.after),
        links=one.job.links,
    )


@contextmanager
def written_step(one: ReadyStep, arguments: Sequence[str]) -> Iterator[RunDirectory]:
    """Writes the step's folder, with a training run's run.json; removes it if the body fails before the start."""
    directory = one.job.files
    new = not directory.jobs.exists()
    made = not directory.path.exists()
    with ExitStack() as stack:
        if one.launch is not None:
            stack.enter_context(written(one.launch, arguments))
        else:
            directory.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            require_own(directory.path)
        try:
            yield directory
        except BaseException:
            # a job that was cancelled while held has left only its line
            if new and not any(directory.logs.glob("*")):
                directory.jobs.unlink(missing_ok=True)
                if one.launch is None and made:
                    shutil.rmtree(directory.path, ignore_errors=True)
            raise
