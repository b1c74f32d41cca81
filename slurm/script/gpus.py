"""How Slurm is asked for GPUs: sites want it in different forms, some of them with the GPUs' type."""

from __future__ import annotations

from megabatch.errors import LaunchError
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.roles import Allocation

_OF_A_JOB = "SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK"
"""What a step would take over from its job in place of its own number. By the latter each task would also see its own
GPU alone, while LOCAL_RANK and NCCL count on all of the node's."""


def gpu_options(size: Allocation, profile: ClusterProfile) -> dict[str, str | None]:
    """sbatch's options for the GPUs of a job; other `gres` of the profile stand beside them.

    Raises: LaunchError where tasks cannot have equal parts.
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
    """srun's options for a step that takes so many GPUs of each of its nodes, whatever its job asked for."""
    return [f"--gres=gpu:{number}" if number else "--gres=none"]


def without_the_jobs() -> str:
    """Bash that has a step take its own number."""
    return f"unset {_OF_A_JOB}"
