"""Runs on GPUs: recipes, and the trainer's own processes, one for each GPU, as the launcher starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import ONE_GPU, RankServer, place
from runs import recipe, train, with_fields, write_run

from megabatch import Recipe
from megabatch.run_directory import ExitCode
from megabatch.slurm.ports import free_port_block

TIMEOUT_S = 120


def cuda_run(folder: Path, name: str, kind: str, /, *, world_size: int = 1, **groups: dict[str, Any]) -> Path:
    """A run directory whose ranks each take a GPU; `groups` replace fields of the recipe's groups."""
    kernels = {"transformer_impl": "local", **groups.pop("kernels", {})}
    return write_run(on_gpus(recipe(folder, kind, **groups, kernels=kernels), world_size), folder / name)


def on_gpus(made: Recipe, world_size: int = 1, /, **groups: dict[str, Any]) -> Recipe:
    """A recipe of a run on CPUs, for GPUs; `groups` replace fields."""
    groups["parallel"] = {"distributed_backend": "nccl", **groups.get("parallel", {})}
    groups["resources"] = {"gpus_per_node": world_size, "tasks_per_node": None}
    return with_fields(made, **groups)


def require_gpus(count: int) -> None:
    """Skips the test where there are fewer, unless all ranks are to share one (`rank_server.ONE_GPU`)."""
    if not ONE_GPU and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, there is {torch.cuda.device_count()}")


def cpu_run(folder: Path, name: str, kind: str, /, **groups: dict[str, Any]) -> Path:
    """The same run on the CPU: the reference."""
    return write_run(recipe(folder, kind, **groups), folder / name)


def train_on(server: RankServer, run_dir: Path, *, world_size: int = 1, stop_after: int | None = None) -> Path:
    """Trains a run, or a part of it, on ranks of the server; returns its folder."""
    codes = server.run(train, world_size=world_size, timeout_s=TIMEOUT_S, run_dir=str(run_dir), stop_after=stop_after)
    assert set(codes) == {ExitCode.DONE if stop_after is None else ExitCode.REQUEUE}
    return run_dir


def train_in_processes(run_dir: Path, *, world_size: int = 1) -> None:
    """Raises: AssertionError with the end of a failed rank's log."""
    ranks = [_start(run_dir, rank, world_size, port) for port in [free_port_block()] for rank in range(world_size)]
    try:
        codes = [process.wait(TIMEOUT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with {code}:\n{_log(run_dir, rank).read_text()[-4000:]}"


def train_at_once(*run_dirs: Path) -> None:
    """Trains runs of one process beside each other."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(train_in_processes, run_dirs))


def _start(run_dir: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        **place(rank, world_size, port, cuda=True),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **python_path(),
    }
    with open(_log(run_dir, rank), "ab") as log:
        command = [sys.executable, "-m", "megabatch.trainer.main", str(run_dir)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _log(run_dir: Path, rank: int) -> Path:
    return run_dir / f"log.{rank}"


def python_path() -> dict[str, str]:
    """The environment in which this checkout is imported, beside what this process's own adds."""
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
