"""Running the ranks inside a container: Pyxis through srun's flags, Apptainer in front of the command."""

from __future__ import annotations

from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile, Container


def srun_flags(job: JobSpec, profile: ClusterProfile, *, exported: list[str]) -> list[str]:
    """Pyxis's flags; `exported` are the variables that must win over the image's own."""
    container = profile.container
    if container is None or container.runtime != "pyxis":
        return []
    flags = [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(_mounts(job, profile, container))}",
    ]
    if job.working_directory is not None:
        flags.append(f"--container-workdir={job.working_directory}")
    if exported:
        flags.append(f"--container-env={','.join(exported)}")
    return flags


def inside(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """The argument vector of one rank, with the profile's interpreter and, for Apptainer, its `exec` in front."""
    container = profile.container
    if container is None:
        return [profile.python or job.command[0], *job.command[1:]]
    command = [container.python, *job.command[1:]]
    if container.runtime == "pyxis":
        return command
    bind = [word for mount in _mounts(job, profile, container) for word in ("--bind", mount)]
    workdir = [] if job.working_directory is None else ["--pwd", str(job.working_directory)]
    gpu = ["--nv"] if job.gpus_per_node else []
    return ["apptainer", "exec", *gpu, *bind, *workdir, container.image, *command]


def _mounts(job: JobSpec, profile: ClusterProfile, container: Container) -> list[str]:
    """Our own folders under the same name inside, then the profile's.

    Raises: LaunchError for a folder that the runtimes' `host:inside,…` syntax cannot name.
    """
    shared = Path(profile.shared_cache) if profile.shared_cache else None
    ours = [path for path in (job.run_directory, job.snapshot, job.working_directory, shared) if path is not None]
    for path in ours:
        if set(str(path)) & set(",:"):
            raise LaunchError(
                f"{path} cannot be mounted into a container: a mount may hold no comma or colon; rename it"
            )
    return [*dict.fromkeys(f"{path}:{path}" for path in ours), *container.mounts]
