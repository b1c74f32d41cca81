"""The ablations of `recipes/sft_ablations.py` trained by a job array on the private Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megabatch.run_directory import RunDirectory
from megabatch.slurm.records import read_records

from .conftest import RECIPES, has_ended, until

pytestmark = pytest.mark.slurm
STEPS = 3


def test_learning_rates_and_seeds_by_one_array(environment: Mapping[str, str], tmp_path: Path) -> None:
    def python(*words: str) -> str:
        command = [sys.executable, "-P", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=dict(environment), check=True, capture_output=True, text=True, timeout=300
        ).stdout

    flags = [
        "--train_iters",
        str(STEPS),
        "--lr_warmup_iters",
        "0",
        "--eval_interval",
        str(STEPS),
        "--run_dir",
        "sweep",
    ]
    sweep = ["--sweep", "lr=0.001,0.02", "seed=1,2", "--dataset", "example:arithmetic#40"]
    said = python(str(RECIPES / "sft_ablations.py"), "--submit", *flags, *sweep)
    assert "4 runs in 1 array of 4, at most 4 at a time" in said and said.count("submitted job array") == 1
    runs = {name: RunDirectory(tmp_path / "sweep" / name) for name in _names()}

    def shown() -> dict[str, dict[str, Any]]:
        text = python("-m", "megabatch.cli", "sweep", "show", "sweep", "--by", "eval_loss", "--json")
        return {one["name"]: one for one in json.loads(text)}

    def finished() -> bool:
        states = {one["state"] for one in shown().values()}
        assert states <= {"pending", "running", "completed"}, {
            name: [path.read_text()[-2000:] for path in run.logs.glob("*")] for name, run in runs.items()
        }
        return states == {"completed"}

    until(finished, timeout_s=180, what="all four")
    # the heartbeat says `done` before the batch script has written how the job ended
    until(lambda: all(has_ended(run) for run in runs.values()), timeout_s=180, what="the last word of all four")
    results = shown()
    losses = [one["metrics"]["eval_loss"] for one in results.values()]
    assert losses == sorted(losses) and len(set(losses)) == 4
    assert all(one["step"] == STEPS for one in results.values())
    for index, (name, run) in enumerate(runs.items()):
        (record,) = read_records(run)
        assert record.job_id.endswith(f"_{index}") and record.endings[-1].exit_code == 0
        resolved = json.loads(run.run_json.read_text())["recipe"]
        assert (resolved["learning_rate"]["lr"], resolved["training"]["seed"]) == _names()[name]


def _names() -> dict[str, tuple[float, int]]:
    return {f"lr{lr:g}-seed{seed}": (lr, seed) for lr in (0.001, 0.02) for seed in (1, 2)}
