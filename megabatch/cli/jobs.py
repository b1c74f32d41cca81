"""`megabatch logs`, `cancel` and `resume`."""

from __future__ import annotations

from pathlib import Path

from megabatch.cli.runs import one_run
from megabatch.errors import LaunchError
from megabatch.slurm import control
from megabatch.slurm.logs import logs


def show_logs(path: Path, *, rank: str, restart: int | None, follow: bool) -> int:
    """Prints a log. Raises: LaunchError when there is none, naming those there are."""
    if rank != "batch" and not rank.isdigit():
        raise LaunchError(f"--rank={rank!r} must be a number or `batch`")
    for line in logs(one_run(path), rank=None if rank == "batch" else int(rank), restart=restart, follow=follow):
        print(line, flush=follow)
    return 0


def cancel_run(path: Path) -> int:
    """Cancels the newest job. Raises: LaunchError when it is not in the queue."""
    run = one_run(path)
    print(f"cancelled job {control.cancel(run)}; its ranks save if the cluster's KillWait is long enough")
    return 0


def resume_run(path: Path) -> int:
    """Submits the stored script again. Raises: LaunchError when a job is still in the queue."""
    run = one_run(path)
    print(f"submitted job {control.resume(run)} in {run}")
    return 0
