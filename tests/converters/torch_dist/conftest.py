"""One process group of one process, and checkpoints that megatron-core itself saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import megabatch

sys.path.insert(0, str(Path(__file__).parent))

from sharded_state import NOT_STACKED


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def by_megatron(tmp_path_factory: pytest.TempPathFactory, saved: Callable[[str], Path], cases: list[str]) -> Path:
    """`CASE/tp2`: saved shard by shard; `CASE/model`: loaded strictly from our conversion into a real model, then
    saved. All in one process, because importing megatron-core takes seconds."""
    from megabatch.converters.to_mcore import to_mcore

    root = tmp_path_factory.mktemp("megatron")
    jobs: dict[str, list[dict[str, Any]]] = {"save": [], "model": []}
    for case in cases:
        for tp in (1, 2, 4):
            jobs["save"].append(
                {"folder": str(saved(case)), "output": str(root / case / f"tp{tp}"), "tp": tp,
                 "stacked": case not in NOT_STACKED}
            )  # fmt: skip
    for case in cases:
        to_mcore(saved(case), root / case / "ours")
        jobs["model"].append(
            {"folder": str(saved(case)), "checkpoint": str(root / case / "ours"), "output": str(root / case / "model")}
        )
    program = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "sharded_state.py"), json.dumps(jobs)]
    path = os.pathsep.join([str(Path(megabatch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return root
