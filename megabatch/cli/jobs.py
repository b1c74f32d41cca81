"""`megabatch logs`, `cancel` and `resume`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megabatch.cli.runs import all_runs, one_run
from megabatch.errors import ConfigError, LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.saved.history import find
from megabatch.slurm import control
from megabatch.slurm.logs import logs
from megabatch.slurm.queue import State
from megabatch.slurm.script.links import is_linked
from megabatch.slurm.state import status

_AT_END = (State.COMPLETED, State.NOT_SUBMITTED)


def show_logs(path: Path, *, rank: str, attempt: int | None, follow: bool) -> int:
    """Prints a log. Raises: LaunchError when there is none; it lists the existing logs."""
    if rank != "batch" and not rank.isdigit():
        raise LaunchError(f"--rank={rank!r} must be a number or `batch`")
    run, empty = one_run(path), True
    for line in logs(run, rank=None if rank == "batch" else int(rank), attempt=attempt, follow=follow):
        print(line, flush=follow)
        empty = False
    if empty:
        print(f"{run}: that log is empty so far; `--rank batch` shows the job's own", file=sys.stderr)
    return 0


def cancel_runs(paths: Sequence[Path]) -> int:
    """Cancels every job of the runs at or beneath the paths. Raises: LaunchError when none is in the queue."""
    runs = all_runs(paths)
    cancelled = {runs[0]: [control.cancel(runs[0])]} if len(runs) == 1 else control.cancel_all(runs)
    if not cancelled:
        raise LaunchError(f"none of the {len(runs)} runs is in the queue; nothing to cancel")
    for run, jobs in cancelled.items():
        print(f"cancelled job {', '.join(jobs)} of {run}")
    print("the ranks save if the cluster's KillWait is long enough")
    return 0


def resume_runs(paths: Sequence[Path], *, links: int | None = None, back_to: str | None = None) -> int:
    """Resubmits the stored scripts of the runs at or beneath the paths; of several runs, those that can continue.

    A run that was started here without Slurm continues here.
    Args: `links`: number of chained jobs, none of which requeues; None is one job, as submitted; `back_to`: the
    checkpoint to resume from, for a single run.
    Raises: LaunchError when no run can continue; ConfigError for options that do not
    fit; CheckpointError when there is no such checkpoint.
    """
    runs = all_runs(paths)
    if len(runs) == 1:
        return _resume(runs[0], links=links, back_to=back_to)
    if back_to is not None:
        raise ConfigError(
            f"--from names a checkpoint of one run, but {len(runs)} runs are given; resume them one by one"
        )
    able = [found.run for found in status(runs, fresh_s=0) if not found.state.active and found.state not in _AT_END]
    if not able:
        raise LaunchError(f"none of the {len(runs)} runs can be resumed: they wait, run or are done")
    refused = 0
    for run in able:
        try:
            _resume(run, links=links, back_to=None)
        except LaunchError as error:
            refused += 1
            print(f"error: {error}", file=sys.stderr)
    return 1 if refused else 0


def _resume(run: Path, *, links: int | None, back_to: str | None) -> int:
    if control.is_local(run):
        from megabatch.entry.resume import resume_here

        if links is not None:
            raise ConfigError(f"{run} was started without Slurm: --chain has no effect; leave it out")
        return resume_here(run, back_to=back_to)
    what = f"{run}" if back_to is None else f"{run} from {find(RunDirectory(run), back_to).name}"
    if links is not None:
        jobs = control.resume_in_links(run, links, back_to=back_to)
        print(f"job{'s' if links > 1 else ''} {', '.join(jobs)} resume{'' if links > 1 else 's'} {what}")
        return 0
    print(f"job {control.resume(run, back_to=back_to)} resumes {what}")
    if is_linked(control.stored_script(RunDirectory(run))):
        print(
            "  note: like the run's earlier jobs, it does not requeue; --chain N queues N that run one after another"
        )
    return 0
