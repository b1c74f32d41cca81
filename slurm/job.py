"""What the launcher needs to know of a job: narrow values that the entry fills from a resolved config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

from megabatch.config.roles import Role
from megabatch.run_directory import RunDirectory
from megabatch.values import dataclass

Preflight = Literal["none", "light", "full"]


@dataclass(frozen=True, slots=True)
class Input:
    """An output of an earlier job that this one reads."""

    path: Path
    """Path that must exist when the job starts."""
    run: Path | None = None
    """Run directory whose newest checkpoint `link` will point to."""
    link: Path | None = None
    """Symbolic link to that checkpoint, made at the job's first attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """One multi-node job; its ranks are `nodes * tasks_per_node` processes of one command."""

    name: str
    """Job name shown in squeue; any text."""
    run_directory: Path
    """Absolute folder on storage that every node sees."""
    nodes: int = 1
    tasks_per_node: int = 1
    """Ranks per node: one per GPU, or one per CPU process."""
    gpus_per_node: int = 0
    """GPUs requested per node; 0 for a CPU run."""
    cpus_per_task: int | None = None
    """CPU cores per rank; None leaves it to the cluster."""
    omp_num_threads: int | None = None
    """OMP_NUM_THREADS of each rank; None means `cpus_per_task`, or 1."""
    mem_gib: int | None = None
    """Memory per node in GiB; 0 requests all of it, None the partition's default."""
    preflight: Preflight = "none"
    """Checks that a short step runs on each node before the ranks start."""
    preflight_answer_s: float = 60
    """Time limit for a node's report, which includes importing torch and first using the devices."""
    max_bad_nodes: int = 2
    """How many nodes the job may exclude, over all its attempts, because that step found them bad."""
    time: str | None = None
    """Time limit in Slurm's spelling (`12:00:00`, `2-00:00:00`, minutes); None is the partition's."""
    signal_delay_s: int = 90
    """How many seconds before the time limit the ranks are asked to save and stop."""
    requeue: bool = True
    """Requeue after saving on that request, when Slurm takes the nodes away, and after failures that may pass."""
    max_requeues_without_progress: int = 2
    """How often in a row the job requeues itself without a newer checkpoint."""
    hang_timeout_s: float = 1800
    """Seconds without a new heartbeat after which the run counts as hung; 0 waits forever."""
    python: str = "python3"
    """Interpreter of the ranks."""
    snapshot: Path | None = None
    """The code at submission: `<SHA-256>.tar`, which each node checks and puts on PYTHONPATH."""
    working_directory: Path | None = None
    """Base folder of the recipe's relative paths; None is the folder where sbatch is called."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of this run; they win over the profile's and the presets."""
    inherit: tuple[str, ...] = ()
    """Names of variables (secrets) to take from the submitting shell; we never write their values anywhere."""
    arguments: tuple[str, ...] | None = None
    """Arguments of each rank's `python`; None runs the trainer on this run directory."""
    program: tuple[str, ...] | None = None
    """Command of each rank instead of python and its arguments."""
    links: int = 1
    """Number of jobs that share the run, one after another; such jobs do not requeue."""
    inputs: tuple[Input, ...] = ()
    """Outputs of earlier jobs that it reads."""
    roles: tuple[Role, ...] = ()
    """Servers that run next to the ranks, on further nodes."""

    @property
    def files(self) -> RunDirectory:
        return RunDirectory(self.run_directory)

    @property
    def total_nodes(self) -> int:
        """Nodes of the ranks and of all roles."""
        return self.nodes + sum(role.nodes for role in self.roles)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def command(self) -> tuple[str, ...]:
        """Full argument vector of one rank, without any container in front."""
        if self.program is not None:
            return self.program
        # -P: a checkout in the folder that the job was submitted from must not hide the snapshot
        trainer = ("-P", "-m", "megabatch.trainer.main", str(self.run_directory))
        return (self.python, *(trainer if self.arguments is None else self.arguments))
