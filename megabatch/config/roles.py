"""Servers that a run has beside its ranks, on nodes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megabatch.config.declare import freeze_lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A program that serves over HTTP while the ranks run; it is started before them and stopped after them."""

    name: str
    """Lower-case letters, digits and underscores; names its logs and the variable with its addresses."""
    command: Sequence[str]
    """The program and its arguments, no shell reads them. It serves on the port `MEGABATCH_ROLE_PORT` and takes
    requests that carry `MEGABATCH_ROLE_TOKEN`. `python` as the first word is the interpreter that ranks have."""
    nodes: int = 1
    """Nodes of its own, beside those of the ranks."""
    tasks_per_node: int = 1
    """Servers on each of them, each with a port and a log of its own."""
    gpus_per_node: int = 0
    """GPUs taken on each of its nodes."""
    cpus_per_task: int | None = None
    """CPU cores of each server; None leaves it to the cluster."""
    health: str = "/health"
    """Path that answers `200` once the server is ready; the ranks start when every server has."""
    ready_s: int = 900
    """Seconds that it may take until then."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    @property
    def tasks(self) -> int:
        """Servers in all."""
        return self.nodes * self.tasks_per_node

    @property
    def variable(self) -> str:
        """The ranks' variable with its addresses, separated by commas: `http://10.0.0.3:15021`, …"""
        return f"MEGABATCH_ROLE_{self.name.upper()}"
