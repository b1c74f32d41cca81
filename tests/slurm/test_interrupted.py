"""Ctrl-C while sbatch runs, on a real Slurm: whether the controller took the job or not, none stays in the queue."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.render import render
from megabatch.slurm.submit import submit

from .conftest import payload_spec


@pytest.fixture
def listening() -> Iterator[None]:
    """A process that a shell starts in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("slurm", "listening")
@pytest.mark.slurm
@pytest.mark.parametrize("taken", [True, False])
def test_no_job_is_left_behind(taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("sbatch")
    lines = ["#!/bin/bash", f'{real} "$@" >&2' if taken else ":", "kill -INT $PPID", "sleep 1"]
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text("\n".join(lines))
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    job = payload_spec(tmp_path / "run")
    with pytest.raises(LaunchError, match="interrupted"):
        submit(RunDirectory(job.run_directory), render(job, ClusterProfile()))
    left = subprocess.run(
        ["squeue", "--noheader", "--format=%T %o"], capture_output=True, text=True, check=True
    ).stdout
    assert not [line for line in left.splitlines() if str(tmp_path) in line and not line.startswith("COMPLETING")]
