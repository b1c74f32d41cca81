"""Resources that a run requests; a cluster profile, not a recipe, says where it runs (partition, account, …)."""

from __future__ import annotations

from typing import Literal

from megabatch.config.declare import MOST_RANKS, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Nodes, ranks, memory and time of the job."""

    nodes: int = param(1, at_least=1, at_most=MOST_RANKS)
    """Nodes of the job."""
    gpus_per_node: int = param(8, at_least=0, at_most=MOST_RANKS)
    """GPUs to use on each node; 0 trains on CPUs."""
    tasks_per_node: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks per node; None means one per GPU, or one without GPUs."""
    cpus_per_task: int | None = param(None, at_least=1)
    """CPU cores per rank; None leaves it to the cluster."""
    mem_gib: int | None = param(None, at_least=1)
    """Host memory per node in GiB; None leaves it to the cluster."""
    time: str = param("24:00:00")
    """Time limit of each attempt of the job: `minutes`, `[days-]hours:minutes:seconds`, …"""
    signal_delay_s: int = param(90, at_least=1)
    """Seconds before that limit at which the ranks are asked to save and stop; must be below `time`."""
    requeue: bool = param(True)
    """Requeues the job after it saved on a signal, after a node failed, and after failures that may be temporary: a
    killed rank, a lost connection, a hang. Faults with an error message of their own end it."""
    max_requeues_without_progress: int = param(2, at_least=0)
    """How often in a row the job requeues itself without a newer checkpoint than when it started: after a crash, a
    lost rank, a hang, or a time limit that came too early. With progress there is no limit."""
    hang_timeout_min: float = param(30.0, at_least=0)
    """Minutes without a finished step, evaluation batch or checkpoint after which all ranks write their stacks to
    their logs and the job ends as hung; four times as long until the first step is done. 0 disables it."""
    preflight: Literal["none", "light", "full"] | None = param(None)
    """Checks of each node before the ranks start; bad nodes are excluded and the job is requeued. `light` checks GPUs,
    disks and clocks; `full` also multiplies matrices and reduces between pairs of nodes. None means `full` with GPUs
    and `none` without."""
    max_bad_nodes: int = param(2, at_least=0)
    """How many nodes a job may exclude because of the preflight; with more it fails."""
    job_name: str | None = param(None)
    """Name in the queue; None means the recipe's."""
    omp_num_threads: int | None = param(None, at_least=1)
    """OMP_NUM_THREADS of each rank; None means `cpus_per_task`, or 1."""

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def preflight_level(self) -> Literal["none", "light", "full"]:
        return self.preflight or ("full" if self.gpus_per_node else "none")

    @property
    def world_size(self) -> int:
        """All ranks of the run."""
        return self.nodes * self.ranks_per_node
