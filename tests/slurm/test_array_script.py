"""Arrays' scripts and groups, without Slurm."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode
from megabatch.slurm.array import (
    DEFAULT_MAX_SIZE,
    JobArray,
    expected_start,
    grouped,
    limits,
    max_array_size,
    render_array,
)
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile

JOB = JobSpec(name="a", run_directory=Path("/runs/a"), nodes=1, time="10")


def _named(*names: str, **spec: object) -> list[JobSpec]:
    return [replace(JOB, name=name, run_directory=Path("/runs", name), **spec) for name in names]


def test_jobs_that_ask_for_the_same_share_an_array() -> None:
    jobs = [*_named("a", "b"), *_named("c", nodes=2), *_named("d", omp_num_threads=4), *_named("e", "f", nodes=2)]
    assert grouped(jobs, ClusterProfile(), max_size=100) == [[0, 1, 3], [2, 4, 5]]


def test_a_cluster_gives_all_the_same_limit() -> None:
    """What a profile cuts to one value is one shape."""
    jobs = [*_named("a", time="20"), *_named("b", time="30")]
    assert grouped(jobs, ClusterProfile(), max_size=9) == [[0], [1]]
    assert grouped(jobs, ClusterProfile(time="10"), max_size=9) == [[0, 1]]


def test_an_array_is_split_where_slurm_takes_no_more() -> None:
    jobs = _named(*map(str, range(7)))
    assert grouped(jobs, ClusterProfile(), max_size=3) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("max_parallel", "sizes", "parts"),
    [
        (4, [14], [4]),
        (4, [9, 9], [2, 2]),
        (6, [1001, 1001, 10], [3, 2, 1]),
        (9, [1, 10], [1, 8]),
        (2, [4, 4, 2], [1, 1, 1]),
        (100, [3, 5], [3, 5]),
        (None, [3, 5], [None, None]),
    ],
)
def test_arrays_share_the_limit(max_parallel: int | None, sizes: list[int], parts: list[int | None]) -> None:
    assert limits(max_parallel, sizes) == parts


def test_indices_and_limit() -> None:
    array = JobArray(name="s", folder=Path("/runs/arrays/0"), jobs=tuple(_named("a", "b", "c")), max_parallel=2)
    script = render_array(array, ClusterProfile(), scripts=["", "", ""])
    assert "#SBATCH --array=0-2%2\n" in script and "#SBATCH --output=/runs/arrays/0/batch.log\n" in script
    one = replace(array, jobs=array.jobs[:1], max_parallel=None)
    assert "#SBATCH --array=0-0\n" in render_array(one, ClusterProfile(), scripts=[""])


@pytest.mark.parametrize("name", ["a b", "it's", '"', "$(touch pwned)", "`touch pwned`", "ü", "\n", "$x", "*", "a\\b"])
def test_an_element_finds_its_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    job = replace(JOB, run_directory=tmp_path / name)
    job.run_directory.mkdir()
    own = 'echo "ran in $PWD"\n'
    job.files.script.write_text(own)
    array = JobArray(name="s", folder=tmp_path, jobs=(JOB, job))
    script = render_array(array, ClusterProfile(), scripts=["", own])
    environment = {"PATH": "/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash"], input=script, text=True, check=True, env=environment, cwd=tmp_path)
    log = job.files.logs / "batch.7_1.log"
    assert log.read_text() == f"ran in {tmp_path}\n"
    assert not (tmp_path / "pwned").exists()
    job.files.script.write_text(own + "touch pwned\n")
    done = subprocess.run(["bash"], input=script, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == ExitCode.CONFIG
    assert "is not the script that was submitted" in log.read_text()
    assert not (tmp_path / "pwned").exists(), "a script that was put there afterwards does not run"


def test_an_array_in_a_folder_with_a_backslash_is_refused() -> None:
    with pytest.raises(LaunchError, match="backslash"):
        render_array(JobArray(name="s", folder=Path("/a\\b"), jobs=(JOB,)), ClusterProfile(), scripts=[""])


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert max_array_size() == DEFAULT_MAX_SIZE
    assert expected_start("#!/bin/bash\n") is None


@pytest.mark.parametrize(("says", "size"), [("MaxArraySize            = 51", 51), ("Nothing = 3", DEFAULT_MAX_SIZE)])
def test_the_limit_is_the_controllers(says: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert max_array_size() == size
