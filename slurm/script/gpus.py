"""How Slurm is asked for GPUs: sites want it in different forms, some of them with the GPUs' type."""

from __future__ import annotations

from megabatch.errors import LaunchError
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.roles import Allocation

_OF_A_JOB = "SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK"
"""Variables from which a step would inherit its job's number of GPUs. With the latter each task would also see only
its own GPU, while LOCAL_RANK and NCCL need to see all of the node's."""


def gpu_options(size: Allocation, profile: ClusterProfile) -> dict[str, str | None]:
    """sbatch's options for the GPUs of a job, together with the profile's other `gres`.

    Raises: LaunchError if the GPUs cannot be divided equally among tasks.
    """
    others = profile.sbatch.get("gres")
    options: dict[str, str | None] = {} if others is None else {"gres": str(others)}
    number = size.gpus_per_node
    if not number:
        return options
    if profile.gpu_request == "gres":
        asked = ":".join(filter(None, ("gpu", profile.gpu_type, str(number))))
        return {"gres": asked if others is None else f"{asked},{others}"}
    if profile.gpu_request == "gpus-per-task":
        if number % size.tasks_per_node:
            raise LaunchError(
                f'gpu_request = "gpus-per-task": the {number} GPUs of a node must divide by its {size.tasks_per_node} '
                'tasks; change one of them, or set gpu_request = "gpus-per-node" in the cluster profile'
            )
        number //= size.tasks_per_node
        options |= {"ntasks": str(size.nodes * size.tasks_per_node)}
    return options | {profile.gpu_request: ":".join(filter(None, (profile.gpu_type, str(number))))}


def of_step(number: int) -> list[str]:
    """srun's options for a step that takes this many GPUs on each of its nodes, whatever its job requested."""
    return [f"--gres=gpu:{number}" if number else "--gres=none"]


def without_the_jobs() -> str:
    """Bash that makes a step use its own number of GPUs."""
    return f"unset {_OF_A_JOB}"
