"""Running the ranks inside a container: Pyxis through srun's flags, Apptainer in front of the command."""

from __future__ import annotations

from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.slurm.environment import job_variables
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile, Container

_SCRIPTS = ("PYTHONPATH", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The batch script exports these itself; an image's own PYTHONPATH would hide the code snapshot."""
_TASKS = ("RANK", "LOCAL_RANK", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURMD_NODENAME")
"""Set only in each task, and dropped by Apptainer's `--cleanenv`."""


def srun_flags(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """Pyxis's flags. An image's variables win over the host's, except those that `--container-env` names."""
    container = profile.container
    if container is None or container.runtime != "pyxis":
        return []
    flags = [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(_mounts(job, profile, container))}",
    ]
    if job.working_directory is not None:
        flags.append(f"--container-workdir={job.working_directory}")
    shared = [v.name for v in job_variables(job, profile) if not v.node_local]
    names = dict.fromkeys([*shared, *profile.inherit, *job.inherit, *_SCRIPTS])
    return [*flags, f"--container-env={','.join(names)}", *container.options]


def inside(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """The argument vector of one rank, with the profile's interpreter and, for Apptainer, its `exec` in front."""
    container = profile.container
    interpreter = container.python if container is not None else profile.python
    command = list(job.command)
    if interpreter and job.program is None:
        command[0] = interpreter
    if container is None:
        return command
    if container.runtime == "pyxis":
        return command
    bind = [word for mount in _mounts(job, profile, container) for word in ("--bind", mount)]
    workdir = [] if job.working_directory is None else ["--pwd", str(job.working_directory)]
    gpu = ["--nv"] if job.gpus_per_node else []
    # without --no-eval Apptainer runs `$(…)` in the values of variables
    apptainer = [
        "apptainer",
        "exec",
        "--no-eval",
        *gpu,
        *bind,
        *workdir,
        *container.options,
        container.image,
        *command,
    ]
    return ["bash", "-c", _apptainer_environment(job, profile), "apptainer", *apptainer]


def _apptainer_environment(job: JobSpec, profile: ClusterProfile) -> str:
    """Bash that gives every variable of ours its `APPTAINERENV_` twin and goes on with its arguments.

    The twins win over the image's variables and survive `--cleanenv`; `--env` would split values at commas.
    """
    names = [v.name for v in job_variables(job, profile)]
    words = " ".join(dict.fromkeys([*names, *profile.inherit, *job.inherit, *_SCRIPTS, *_TASKS]))
    return (
        f'for name in {words} "${{!MEGABATCH_@}}"; do '
        'if [ -n "${!name+set}" ]; then export "APPTAINERENV_$name=${!name}"; fi; done; exec "$@"'
    )


def mounted(job: JobSpec, profile: ClusterProfile) -> list[Path]:
    """Host folders that ranks see under the same path: ours, the profile's, and Apptainer's own mounts."""
    container = profile.container
    if container is None:
        return [Path("/")]
    pairs = (mount.split(":") for mount in _mounts(job, profile, container))
    folders = [Path(pair[0]) for pair in pairs if pair[0] == pair[1]]
    contained = {"-c", "-C", "--contain", "--containall"} & set(container.options)
    if container.runtime == "apptainer" and not contained:
        folders += [Path("/tmp"), *([] if "--no-home" in container.options else [Path.home()])]
    if container.runtime == "pyxis" and "--container-mount-home" in container.options:
        folders.append(Path.home())
    return folders


def _mounts(job: JobSpec, profile: ClusterProfile, container: Container) -> list[str]:
    """Our own folders under the same path inside, then the profile's; enroot's own /tmp is in memory.

    Raises: LaunchError for a folder that the runtimes' `host:inside,…` syntax cannot name.
    """
    made = (one.run or one.path for one in job.inputs)
    folders = (
        *(job.run_directory, job.snapshot and job.snapshot.parent, job.working_directory, *made),
        *(profile.shared_cache, profile.local_cache),
    )
    ours = [Path(path) for path in folders if path is not None]
    for path in ours:
        if set(str(path)) & set(",:"):
            raise LaunchError(
                f"{path} cannot be mounted into a container: a mount must not contain a comma or colon; rename it"
            )
    # older versions of Pyxis require both sides
    theirs = (mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts)
    return [*dict.fromkeys([*(f"{path}:{path}" for path in ours), *theirs])]
