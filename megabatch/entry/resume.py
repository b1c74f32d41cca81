"""Resumes a run that was started on this machine, without its recipe."""

from __future__ import annotations

import sys
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.entry.launch import job_of
from megabatch.run_directory import ExitCode
from megabatch.slurm.control import held_to_resume
from megabatch.slurm.local import run_local
from megabatch.slurm.profile import ClusterProfile, load_profile


def resume_here(run: Path, *, back_to: str | None = None) -> int:
    """Resumes a run that was started with `--local` from its checkpoint, and returns the exit code.

    Args: back_to: the checkpoint to resume from instead of the last; later ones are set aside.
    Raises: LaunchError when it is running, done, or another user's; CheckpointError when there is no such checkpoint.
    """
    with held_to_resume(run, back_to=back_to) as directory:
        config = RunConfig.load(directory.run_json)
        cluster = config.provenance.get("cluster")
        profile = load_profile(str(cluster)) if cluster else ClusterProfile()
        code = run_local(job_of(config.recipe, directory, snapshot=None), profile)
    if code == ExitCode.REQUEUE:
        print(f"stopped and saved; resume with: megabatch resume {run}")
    elif code != ExitCode.DONE:
        print(f"error: the run failed with exit code {code}; megabatch why {run}", file=sys.stderr)
    return code
