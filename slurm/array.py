"""Job arrays: many runs that ask for the same resources, submitted by one call of sbatch.

The array's script finds its element's run directory by index, redirects its output there, and runs the job script
stored in it: a run of an array is stopped, requeued, watched and resumed like any other.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.environment import for_sbatch
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import shell
from megabatch.slurm.script.directives import directives
from megabatch.values import dataclass

DEFAULT_MAX_SIZE = 1001
"""Slurm's default MaxArraySize."""
_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class JobArray:
    """Jobs of one shape; the element with index i runs `jobs[i]`."""

    name: str
    """Name shown in squeue; any text."""
    folder: Path
    """Its own absolute folder: holds its script, and an element's output until it has found its run directory."""
    jobs: tuple[JobSpec, ...]
    max_parallel: int | None = None
    """How many elements may run at once; None is no limit."""

    @property
    def files(self) -> RunDirectory:
        return RunDirectory(self.folder)

    @property
    def indices(self) -> str:
        """The indices as sbatch takes them: `0-255%4`."""
        return f"0-{len(self.jobs) - 1}" + ("" if self.max_parallel is None else f"%{self.max_parallel}")


def grouped(jobs: Sequence[JobSpec], profile: ClusterProfile, *, max_size: int) -> list[list[int]]:
    """Positions of the jobs of each array: jobs with the same sbatch options, at most `max_size` per array.

    Raises: LaunchError for text that Slurm cannot carry.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for position, job in enumerate(jobs):
        alike = replace(job, name="", run_directory=Path("/"))
        groups.setdefault(tuple(directives(alike, profile)), []).append(position)
    return [group[i : i + max_size] for group in groups.values() for i in range(0, len(group), max_size)]


def limits(max_parallel: int | None, sizes: Sequence[int]) -> list[int | None]:
    """How many elements of each array may run at once, so that all together stay within `max_parallel`.

    Each array gets a share by its size, at least one: with more arrays than `max_parallel`, each runs one element.
    """
    if max_parallel is None:
        return [None] * len(sizes)
    left, parts = max_parallel, []
    for number, size in enumerate(sizes):
        later = len(sizes) - number - 1
        part = min(size, max(1, min(left - later, round(left * size / sum(sizes[number:])))))
        parts.append(part)
        left = max(left - part, 0)
    return list(parts)


def render_array(array: JobArray, profile: ClusterProfile, *, scripts: Sequence[str]) -> str:
    """The exact text that sbatch gets.

    Args: `scripts` are the elements' own (`megabatch.slurm.render.render` of each job), stored in their folders: an
    element runs its script only if it is unchanged.
    Raises: LaunchError for text that Slurm or bash cannot carry.
    """
    named = zip(array.jobs, scripts, strict=True)
    lines = [
        *array_directives(array, profile),
        "",
        "set -eo pipefail",
        "# the run directory of each index, and the SHA-256 of the script in it",
        "runs=(",
        *(f"    {shell(str(job.run_directory))} {_sha256(script)}" for job, script in named),
        ")",
        "run=${runs[2 * SLURM_ARRAY_TASK_ID]} digest=${runs[2 * SLURM_ARRAY_TASK_ID + 1]}",
        'mkdir -p -- "$run/logs"',
        f"export MEGABATCH_ARRAY_LOG={shell(str(array.folder / 'batch.log'))}",
        'exec >>"$run/logs/batch.${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.log" 2>&1',
        "copy=$(mktemp)",
        'cat -- "$run/job.sbatch" >"$copy"',
        'exec 3<"$copy"',
        'read -r found _ < <(sha256sum <"$copy")',
        'rm -f -- "$copy"',
        'if [ "$found" != "$digest" ]; then',
        '    echo "megabatch: $run/job.sbatch is not the script that was submitted; submit the sweep again" >&2',
        f"    exit {ExitCode.CONFIG}",
        "fi",
        "exec bash /dev/fd/3",
    ]
    return "\n".join(lines) + "\n"


def array_directives(array: JobArray, profile: ClusterProfile) -> list[str]:
    """The array's sbatch directives."""
    shape = replace(array.jobs[0], name=array.name, run_directory=array.folder)
    return directives(shape, profile, array=array.indices)


def _sha256(script: str) -> str:
    return hashlib.sha256(script.encode(errors="surrogateescape")).hexdigest()


def element_id(array_id: str, index: int) -> str:
    """The id that squeue shows: `123_4`."""
    return f"{array_id}_{index}"


def max_array_size() -> int:
    """This cluster's limit on an array's elements; Slurm's default if the cluster does not report one.

    Raises: LaunchError if arrays are turned off.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"), re.MULTILINE)
    size = int(found[1]) if found else DEFAULT_MAX_SIZE
    if size < 2:
        raise LaunchError("this cluster takes no job arrays (MaxArraySize=0); submit the runs one by one")
    return size


def expected_start(script: str) -> str | None:
    """When Slurm would start a job of this script, `2026-11-21T10:50:00`; None if it does not say."""
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"],
            input=script,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=for_sbatch(os.environ, script),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"to start at (\S+)", done.stderr)
    return found[1] if found else None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
