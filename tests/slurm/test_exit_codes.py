"""What exit codes mean to the batch script, and the marker that the first process to fail leaves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megabatch.run_directory import ExitCode
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.script.exit_codes import MAY_PASS, OF_SIGNAL, WRITE_ONCE

from .conftest import Submit

NODES = ClusterProfile(partition="urgent")


def test_the_scripts_patterns_are_the_codes() -> None:
    script = "\n".join(
        f'for code in {{0..255}}; do case "$code" in {pattern}) echo "{name} $code" ;; esac; done'
        for name, pattern in (("signal", OF_SIGNAL), ("pass", MAY_PASS))
    )
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    expected = [f"signal {code}" for code in range(256) if ExitCode.of_signal(code)]
    assert said == expected + [f"pass {code}" for code in range(256) if ExitCode.may_pass(code)]


def test_the_first_of_many_writes_the_mark_whole(tmp_path: Path) -> None:
    script = f"""{WRITE_ONCE}
        for who in {{1..40}}; do write_once "$who said a word" mark "$who" & done
        until [ -e mark ]; do :; done
        cat mark; wait; cat mark; ls"""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    early, late, files = done.stdout.splitlines()
    assert early == late and early.endswith(" said a word") and files == "mark"


def test_a_marker_stays_where_there_are_no_hard_links(tmp_path: Path) -> None:
    script = f"ln() {{ return 1; }}\n{WRITE_ONCE}\nwrite_once first mark 1; write_once second mark 2; cat mark; ls"
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "first\nmark\n"


@pytest.mark.slurm
def test_an_empty_mark_does_not_end_the_script_without_a_word(submit_payload: Submit) -> None:
    job = submit_payload(profile=NODES, program=("bash", "-c", ': >"$MEGABATCH_FAILED"; exit 3'), requeue=False)
    end = job.wait()
    assert (end.state, end.exit_code) == (State.FAILED, 3)
    assert [ending.exit_code for ending in read_records(job.run)[0].endings] == [3]


@pytest.mark.slurm
def test_the_failure_of_a_container_runtime_itself_is_final(submit_payload: Submit) -> None:
    """Apptainer and ssh end with 255, which is no death by a signal."""
    job = submit_payload(profile=NODES, options={"fail_rank": 0, "fail": 255})
    end = job.wait()
    assert (end.state, end.exit_code, end.attempt) == (State.FAILED, 255, 0)
    assert "rank 0 on n" in job.batch_log() and "requeue" not in job.batch_log()
