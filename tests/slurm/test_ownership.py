"""What a job runs is its user's own: planted, foreign and writable files are refused by name."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.errors import ConfigError, LaunchError
from megabatch.run_directory import ExitCode, RunDirectory, write_atomic
from megabatch.slurm.job import JobSpec
from megabatch.slurm.ownership import read_own, require_own
from megabatch.slurm.profile import load_profile
from megabatch.slurm.script.ending import finish
from megabatch.slurm.script.inputs import inputs
from megabatch.slurm.script.stopping import run_directory

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
STRANGER = 12345


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    write_atomic(run.run_json, "{}")
    write_atomic(run.script, "#!/bin/bash\n")
    run.jobs.write_text('{"job_id": "7", "time": 1, "cluster": null}\n{"job_id": "7", "attempt": 0, "exit_code": 1}\n')
    return run


def test_own_files_are_read(run: RunDirectory) -> None:
    assert read_own(run.script) == b"#!/bin/bash\n"
    require_own(run.path, run.run_json, run.path / "nothing")


def test_a_script_that_others_can_write_is_not_resumed(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    run.script.chmod(0o646)
    assert main(["resume", str(run.path)]) == ExitCode.FAILED
    assert f"{run.script} can be written by others" in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/hostname")])
def test_only_a_plain_file_is_a_script(run: RunDirectory, make: object, capsys: pytest.CaptureFixture[str]) -> None:
    run.script.unlink()
    make(run.script)  # type: ignore[operator]
    assert main(["resume", str(run.path)]) == ExitCode.FAILED
    assert str(run.script) in capsys.readouterr().err


@needs_root
@pytest.mark.parametrize("name", ["", "run.json", "job.sbatch"])
def test_what_somebody_else_put_there_is_not_resumed(
    run: RunDirectory, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chown(run.path / name, STRANGER, -1)
    assert main(["resume", str(run.path)]) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert f"{run.path / name} belongs to user {STRANGER}" in said and "Traceback" not in said


@needs_root
@pytest.mark.parametrize("name", ["", "run.json"])
def test_a_job_does_not_begin_in_somebody_elses_folder(run: RunDirectory, name: str) -> None:
    os.chown(run.path / name, STRANGER, -1)
    lines = ["set -eo pipefail", *run_directory(JobSpec(name="j", run_directory=run.path)), "echo went on"]
    done = subprocess.run(["bash"], input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.CONFIG and "belongs to another user" in done.stderr
    assert "went on" not in done.stdout


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_what_is_written_for_jobs_is_for_its_owner_to_write(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "job.sbatch", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "job.sbatch").stat().st_mode & 0o777 == 0o644


def test_a_profile_that_others_can_write_is_refused(tmp_path: Path) -> None:
    profile = tmp_path / "site.toml"
    profile.write_text('setup = ["echo hello"]\n')
    profile.chmod(0o666)
    with pytest.raises(ConfigError, match=r"site\.toml can be written by others"):
        load_profile(str(profile))
    profile.chmod(0o644)
    assert load_profile(str(profile)).setup == ("echo hello",)


def test_a_link_is_not_read(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.script)
    with pytest.raises(LaunchError, match="is a link"):
        read_own(tmp_path / "link")


def test_a_count_that_somebody_wrote_is_a_number_to_bash(tmp_path: Path) -> None:
    """`$((x))` runs what stands in brackets in x."""
    run = RunDirectory(tmp_path)
    run.logs.mkdir()
    (run.logs / "fruitless.7").write_text(f"a[$(touch {tmp_path}/ran)]\n")
    lines = [
        f"MEGABATCH_RUN={tmp_path} MEGABATCH_JOB_ID=7 MEGABATCH_ATTEMPT=0 status=70 stop= began_with=",
        f"MEGABATCH_FAILED={tmp_path}/failed MEGABATCH_STOPPED={tmp_path}/stopped",
        f"MEGABATCH_STOP_REQUEST={tmp_path}/stop",
        'newest_checkpoint() { :; }; patiently() { echo " Restarts=0 "; }; scontrol() { :; }',
        *finish(JobSpec(name="j", run_directory=tmp_path)),
    ]
    done = subprocess.run(["bash"], input="\n".join(lines), capture_output=True, text=True, check=False)
    assert not (tmp_path / "ran").exists()
    assert (run.logs / "fruitless.7").read_text() == "1\n", done.stderr


@pytest.mark.parametrize("name", ["../../evil", "/evil", ".."])
def test_a_pointer_names_a_checkpoint_beside_it(tmp_path: Path, name: str) -> None:
    from megabatch.slurm.job import Input

    earlier = RunDirectory(tmp_path / "train")
    earlier.checkpoints.mkdir(parents=True)
    earlier.latest.write_text(name + "\n")
    link = tmp_path / "inputs" / "train"
    job = JobSpec(name="j", run_directory=tmp_path, inputs=(Input(link / "hf", earlier.path, link),))
    script = "\n".join([f"MEGABATCH_RUN={tmp_path}", *inputs(job)])
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.CONFIG and not link.is_symlink(), done.stderr
