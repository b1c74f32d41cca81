"""The `#SBATCH` lines of a job script."""

from __future__ import annotations

from pathlib import Path

from megabatch.config.walltime import seconds
from megabatch.errors import LaunchError
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import directive, label
from megabatch.slurm.roles import allocation
from megabatch.slurm.script.gpus import gpu_options


def directives(job: JobSpec, profile: ClusterProfile, *, array: str | None = None) -> list[str]:
    """Args: `array`: indices of a job array (`0-255%4`); the job's run directory is then the array's folder."""
    logs = _pattern(job.run_directory if array else job.files.logs)
    size = allocation(job)
    options: dict[str, str | int | bool | None] = {
        "job-name": label(job.name),
        "array": array,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "exclude": profile.exclude,
        "nodes": size.nodes,
        "ntasks-per-node": size.tasks_per_node,
        "cpus-per-task": size.cpus_per_task,
        **gpu_options(size, profile),
        "mem": None if job.mem_gib is None else f"{job.mem_gib}G" if job.mem_gib else "0",
        "time": _time_limit(job, profile),
        "signal": f"B:USR2@{job.signal_delay_s}",
        "requeue" if job.requeue else "no-requeue": True,
        "open-mode": "append",
        "chdir": None if job.working_directory is None else str(job.working_directory),
        "output": f"{logs}/batch.log" if array else f"{logs}/batch.%j.log",
        "export": "ALL",
        "kill-on-invalid-dep": "yes",
    }
    of_memory = [name for name in profile.sbatch if name.startswith("mem") and name != "mem-bind"]
    if of_memory and job.mem_gib is not None:
        theirs = f"sbatch.{of_memory[0]}={profile.sbatch[of_memory[0]]!r}"
        raise LaunchError(
            f"resources.mem_gib={job.mem_gib} and the profile's {theirs} both request memory; leave one of them out"
        )
    options |= {name: value for name, value in profile.sbatch.items() if name != "gres"}
    chosen = {name: value for name, value in options.items() if value is not None and value is not False}
    return ["#!/bin/bash", *(directive(name, value) for name, value in chosen.items())]


def _time_limit(job: JobSpec, profile: ClusterProfile) -> str | None:
    """The run's limit, capped at the cluster's longest: a run with a capped limit saves, requeues and continues."""
    limits = [limit for limit in (job.time, profile.time) if limit is not None]
    shortest = min(limits, key=seconds, default=None)
    if shortest is not None and job.signal_delay_s >= seconds(shortest):
        raise LaunchError(
            f"resources.signal_delay_s={job.signal_delay_s} must be below the time limit of {seconds(shortest)} s, or "
            f"every run is asked to stop as it starts; try {max(1, seconds(shortest) // 4)}"
        )
    return shortest


def _pattern(folder: Path) -> str:
    """Escapes text for sbatch's file patterns: % begins a symbol, and a single backslash disables all symbols."""
    if "\\" in str(folder):
        raise LaunchError(f"{folder}: Slurm cannot write to a folder with a backslash; choose another name")
    return str(folder).replace("%", "%%")
