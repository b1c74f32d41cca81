"""Runs of the trainer's own processes, one for each GPU, in the environment that the launcher gives them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import recipe, write_run

from megabatch.slurm.ports import free_port_block

TIMEOUT_S = 300


def cuda_run(folder: Path, name: str, kind: str, /, *, world_size: int = 1, **groups: dict[str, Any]) -> Path:
    """A run directory whose ranks each take a GPU; `groups` replace fields of the recipe's groups."""
    groups["parallel"] = {"distributed_backend": "nccl", **groups.get("parallel", {})}
    groups["kernels"] = {"transformer_impl": "local", **groups.get("kernels", {})}
    groups["resources"] = {"gpus_per_node": world_size, "tasks_per_node": None}
    return write_run(recipe(folder, kind, **groups), folder / name)


def cpu_run(folder: Path, name: str, kind: str, /, **groups: dict[str, Any]) -> Path:
    """The same run on the CPU: the reference."""
    return write_run(recipe(folder, kind, **groups), folder / name)


def train(run_dir: Path, *, world_size: int = 1) -> None:
    """Raises: AssertionError with the end of a failed rank's log."""
    ranks = [_start(run_dir, rank, world_size, port) for port in [free_port_block()] for rank in range(world_size)]
    try:
        codes = [process.wait(TIMEOUT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with {code}:\n{_log(run_dir, rank).read_text()[-4000:]}"


def _start(run_dir: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[bytes]:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = {
        **os.environ,
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with open(_log(run_dir, rank), "ab") as log:
        command = [sys.executable, "-m", "megabatch.trainer.main", str(run_dir)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _log(run_dir: Path, rank: int) -> Path:
    return run_dir / f"log.{rank}"
