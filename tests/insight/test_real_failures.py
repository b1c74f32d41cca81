"""`why` on failures that really happened, on the private Slurm and on this machine without it."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.insight.diagnosis import diagnose
from megabatch.run_directory import RunDirectory
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local import run_local
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.render import render
from megabatch.slurm.state import status
from megabatch.slurm.submit import submit

from ..slurm.conftest import ENDED, until
from .failing import FAILING, Failing, profile_of


def job_of(failing: Failing, folder: Path) -> JobSpec:
    """Two ranks on one node."""
    folder.mkdir(parents=True)
    return JobSpec(
        name="failing",
        run_directory=folder / "run",
        working_directory=folder,
        python=sys.executable,
        program=failing.program(sys.executable),
        tasks_per_node=2,
        cpus_per_task=1,
        time="10",
        requeue=False,
    )


@pytest.fixture(scope="module")
def submitted(slurm_cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Path]]:
    """All of them at once; each test waits for its own."""
    runs = {}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in slurm_cluster.environment.items():
            environment.setenv(name, value)
        for name, failing in FAILING.items():
            folder = tmp_path_factory.mktemp("failing") / "job"
            job, profile = job_of(failing, folder), profile_of(failing, folder.parent)
            if failing.cause == "dependency":
                failed = subprocess.run(
                    ["sbatch", "--parsable", "--output=/dev/null", "--wrap=false"],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                profile = replace(profile, sbatch={"dependency": f"afterok:{failed.stdout.strip()}"})
            submit(job.files, render(job, profile))
            runs[name] = job.run_directory
        yield runs


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("name", FAILING)
def test_on_slurm(name: str, submitted: Mapping[str, Path]) -> None:
    run, failing = submitted[name], FAILING[name]
    until(lambda: status([run], fresh_s=0)[0].state in ENDED, what=name)
    check(run, failing)
    if failing.cause != "dependency":
        files = RunDirectory(run)
        [ending] = until(lambda: read_records(files)[0].endings, what="the batch script's last word")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SLURM_CONF", "/nowhere/slurm.conf")  # as if Slurm had forgotten it
            assert (status([run])[0].state, ending.exit_code != 0) == (State.FAILED, True)
            check(run, failing)


@pytest.mark.parametrize("name", [name for name, failing in FAILING.items() if failing.local])
def test_here(name: str, tmp_path: Path) -> None:
    job, terminal = job_of(FAILING[name], tmp_path / "here"), io.BytesIO()
    code = run_local(job, terminal=terminal)
    assert f" failed first, with exit code {code}: {job.files.rank_log(0, 0)}\n" in terminal.getvalue().decode()
    check(job.run_directory, FAILING[name])


def check(run: Path, failing: Failing) -> None:
    found = diagnose(run)
    said = f"{found}\n{''.join(path.read_text() for path in sorted((run / 'logs').glob('*.log')))}"
    assert found.cause is not None, said
    assert (found.cause.name, found.rank) == (failing.cause, failing.rank), said
    assert failing.evidence in found.evidence, said
