"""Jobs with roles: the ranks' nodes first, then those of each server."""

from __future__ import annotations

from dataclasses import replace

from megabatch.config.roles import Role
from megabatch.config.rules.roles import role_faults
from megabatch.errors import LaunchError
from megabatch.slurm.job import JobSpec
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Allocation:
    """The Slurm request for all roles together: every node of a job gets the same resources."""

    nodes: int
    tasks_per_node: int
    cpus_per_task: int | None
    gpus_per_node: int


def allocation(job: JobSpec) -> Allocation:
    """The nodes of all roles, each as large as the largest role needs. Raises: LaunchError for a faulty role."""
    check_roles(job.roles)
    sizes = [(job.tasks_per_node, job.cpus_per_task)]
    sizes += [(role.tasks_per_node, role.cpus_per_task) for role in job.roles]
    tasks, cpus = max(sizes, key=lambda size: size[0] * (size[1] or 1))
    return Allocation(
        nodes=job.total_nodes,
        tasks_per_node=tasks,
        cpus_per_task=cpus,
        gpus_per_node=max(job.gpus_per_node, *(role.gpus_per_node for role in job.roles), 0),
    )


def check_roles(roles: tuple[Role, ...]) -> None:
    """Raises: LaunchError with every fault of the roles."""
    if faults := list(role_faults(roles)):
        raise LaunchError("; ".join(map(str, faults)))


def role_job(job: JobSpec, role: Role) -> JobSpec:
    """The job from the view of a role's tasks: their command, their GPUs."""
    words = tuple(map(str, role.command))
    own_python = words[0] == "python"
    return replace(
        job,
        gpus_per_node=role.gpus_per_node,
        arguments=words[1:] if own_python else None,
        program=None if own_python else words,
    )
