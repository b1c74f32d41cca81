"""Servers that run beside the ranks, on their own nodes."""

from __future__ import annotations

from collections.abc import Sequence

from megabatch.config.declare import freeze_lists
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A program that serves HTTP while the ranks run; it starts before them and stops after them."""

    name: str
    """Lower-case letters, digits and underscores; names its logs and the variable with its addresses."""
    command: Sequence[str]
    """The program and its arguments, passed without a shell. It serves on the port `MEGABATCH_ROLE_PORT` and accepts
    requests that carry `MEGABATCH_ROLE_TOKEN`. `python` as the first word is the ranks' interpreter."""
    nodes: int = 1
    """Nodes for this role, in addition to those of the ranks."""
    tasks_per_node: int = 1
    """Servers per node, each with its own port and log."""
    gpus_per_node: int = 0
    """GPUs to use on each of its nodes."""
    cpus_per_task: int | None = None
    """CPU cores per server; None leaves it to the cluster."""
    health: str = "/health"
    """Path that answers `200` once the server is ready; the ranks start when every server is."""
    ready_s: int = 900
    """Seconds within which it must be ready."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    @property
    def tasks(self) -> int:
        """Number of servers."""
        return self.nodes * self.tasks_per_node

    @property
    def variable(self) -> str:
        """The ranks' variable with its addresses, separated by commas: `http://10.0.0.3:15021`, …"""
        return f"MEGABATCH_ROLE_{self.name.upper()}"
