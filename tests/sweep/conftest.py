"""A recipe file that declares a sweep, and its command line run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megabatch.slurm.cluster import PrivateCluster

RECIPES = Path(__file__).parents[2] / "recipes"
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

FILE = """\
import importlib.util
from megabatch import Sweep, main

spec = importlib.util.spec_from_file_location("quickstart", {quickstart!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
recipe = module.recipe
sweep = Sweep(recipe, {sweep})

def here():
    return recipe()

if __name__ == "__main__":
    main(Sweep(here, grid=sweep.grid, zip=sweep.zip, list=sweep.list, filter=sweep.filter,
               max_parallel=sweep.max_parallel, name=sweep.name))
"""


@pytest.fixture
def write_sweep(tmp_path: Path) -> Callable[..., Path]:
    """A file with a sweep over the quickstart recipe, given as the arguments of `Sweep`."""

    def write(sweep: str, *, name: str = "sweep.py") -> Path:
        file = tmp_path / name
        file.write_text(FILE.format(quickstart=str(RECIPES / "quickstart.py"), sweep=sweep), encoding="utf-8")
        return file

    return write


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a recipe file in an empty folder; `slurm` is the cluster that it finds, else there is none."""

    def run_(file: Path, *arguments: str, slurm: PrivateCluster | None = None, code: int = 0) -> Done:
        cwd = tmp_path / "work"
        cwd.mkdir(exist_ok=True)
        environment = dict(os.environ) | (slurm.environment if slurm else {"PATH": str(tmp_path / "nowhere")})
        done = subprocess.run(
            [sys.executable, str(file), *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run_
