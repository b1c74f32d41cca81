"""A signal while sbatch runs, on a real Slurm: whether the controller took the job or not, none stays in the queue."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.chain import ChainedJob, submit_all
from megabatch.slurm.interrupts import held_back
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.render import render
from megabatch.slurm.submit import submit

from .conftest import payload_spec

pytestmark = [pytest.mark.usefixtures("slurm", "listening"), pytest.mark.slurm]


@pytest.fixture
def listening() -> Iterator[None]:
    """A process that a shell starts in the background has SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts lines of bash in the place of sbatch, which is `$real` in them."""

    def put(*lines: str) -> None:
        wrapper = tmp_path / "bin" / "sbatch"
        wrapper.parent.mkdir()
        wrapper.write_text("\n".join(["#!/bin/bash", f"real={shutil.which('sbatch')}", *lines]))
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")

    return put


def queued(folder: Path) -> list[str]:
    """The jobs of scripts below a folder that wait or run."""
    asked = ["squeue", "--noheader", "--format=%i %T %o"]
    listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line and " COMPLETING " not in line]


@pytest.mark.parametrize(
    ("sent", "taken"), [("INT", True), ("INT", False), ("TERM", True), ("TERM", False), ("HUP", True)]
)
def test_no_job_is_left_behind(sent: str, taken: bool, tmp_path: Path, sbatch: Callable[..., None]) -> None:
    sbatch('"$real" "$@" >&2' if taken else ":", f"kill -{sent} $PPID", "sleep 10")
    job = payload_spec(tmp_path / "run")
    with pytest.raises(LaunchError, match="interrupted"):
        submit(RunDirectory(job.run_directory), render(job, ClusterProfile()))
    assert not queued(tmp_path)


def test_a_job_that_its_run_cannot_note_is_cancelled(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = payload_spec(run.path)
    run.jobs.mkdir(parents=True)
    with pytest.raises(LaunchError, match=r"job \d+ cannot be noted \(Is a directory\) and was cancelled"):
        submit(run, render(job, ClusterProfile()))
    assert not queued(tmp_path)


def test_the_jobs_before_the_interrupted_one_are_cancelled(tmp_path: Path, sbatch: Callable[..., None]) -> None:
    """The signal comes while the first is in the queue and noted; nothing ends the launcher in between."""
    count = tmp_path / "count"
    sbatch(f"echo >>{count}", f"[ $(wc -l <{count}) = 2 ] && kill -TERM $PPID", 'exec "$real" "$@"')
    job = payload_spec(tmp_path / "run")
    chained = ChainedJob(name="x", run=RunDirectory(job.run_directory), script=render(job, ClusterProfile()), links=3)
    with pytest.raises(LaunchError, match=r"interrupted while .*; job \d+, submitted before it, was cancelled"):
        submit_all([chained])
    assert not queued(tmp_path)
    assert len(count.read_text()) == 2, "the third was not asked for"


def test_a_signal_that_nobody_asked_for_counts_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the body ends first")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
