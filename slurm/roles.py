"""Jobs whose nodes have roles: those of the ranks first, then those of each server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megabatch.config.roles import Role
from megabatch.errors import LaunchError
from megabatch.slurm.job import JobSpec

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("rank", "batch", "token", "port", "task", "stop", "stopped", "failed", "preflight", "fruitless")
"""Names of other logs, marks and variables."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is asked of Slurm for all roles together: it gives every node of a job the same."""

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
    """Raises: LaunchError for names that cannot be used, and for numbers that make no sense."""
    for fault in _faults(roles):
        raise LaunchError(fault)


def _faults(roles: tuple[Role, ...]) -> Iterator[str]:
    names = [role.name for role in roles]
    for role in roles:
        place = f"role {role.name!r}"
        if not _NAME.fullmatch(role.name) or role.name in _TAKEN:
            yield f"{place} must be named by lower-case letters, digits and underscores, and not {', '.join(_TAKEN)}"
        if names.count(role.name) > 1:
            yield f"{place} is there {names.count(role.name)} times; give each its own name"
        if not role.command or isinstance(role.command, str):
            yield f"{place}: command must be a list of the program and its arguments"
        for number in ("nodes", "tasks_per_node", "ready_s"):
            if getattr(role, number) < 1:
                yield f"{place}: {number}={getattr(role, number)} must be at least 1"
        if not role.health.startswith("/") or not role.health.isprintable() or " " in role.health:
            yield f"{place}: health={role.health!r} must be a path such as /health"


def role_job(job: JobSpec, role: Role) -> JobSpec:
    """The job as the tasks of a role see it: their command, their GPUs."""
    words = tuple(map(str, role.command))
    own_python = words[0] == "python"
    return replace(
        job,
        gpus_per_node=role.gpus_per_node,
        arguments=words[1:] if own_python else None,
        program=None if own_python else words,
    )
