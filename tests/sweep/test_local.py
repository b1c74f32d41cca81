"""A real sweep on this machine: tiny models, trained to the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megabatch.run_directory import RunDirectory

from .conftest import RECIPES


def _run(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = ["--local", "--max_parallel", "2", "--train_iters", "2", "--lr_warmup_iters", "1", "--run_dir", "sweep"]
    data = ["--dataset", "example:arithmetic#40", "--eval_interval", "2", "--sweep", "lr=0.001,0.02", "seed=1"]
    return subprocess.run(
        [sys.executable, str(RECIPES / "sft_ablations.py"), *flags, *data, *more],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "MEGABATCH_CACHE"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_runs_side_by_side_then_nothing_to_do_then_a_failure(tmp_path: Path) -> None:
    done = _run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["lr0.001-seed1", "lr0.02-seed1"]
    for name in names:
        files = RunDirectory(tmp_path / "sweep" / name)
        assert f"{name}: started" in done.stdout and f"{name}: done" in done.stdout
        assert files.rank_log(0, 0).exists() and files.step(2).is_dir()
        assert not (files.path / "cache").exists()
    assert any((tmp_path / "sweep" / "cache").iterdir())
    table = done.stdout.splitlines()[-3:]
    assert table[0].split()[:4] == ["run", "lr", "seed", "tokens/s"] and "eval_loss" in table[0]
    assert sorted(line.split()[0] for line in table[1:]) == names
    again = _run(tmp_path)
    assert again.returncode == 0 and again.stdout.count("left alone: ") == 2 and "started" not in again.stdout
    other = _run(tmp_path, "--weight_decay", "0.2")
    assert other.returncode == 2 and "differs in optimizer.weight_decay" in other.stderr
