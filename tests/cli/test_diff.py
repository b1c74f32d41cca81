"""`megabatch diff` on runs that differ in one thing each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabatch.cli.command import main
from megabatch.run_directory import RunDirectory
from megabatch.slurm.snapshot import snapshot_of


def made(
    folder: Path, *, lr: float = 0.1, tp: int = 1, variable: str = "1", code: str = "x = 1\n", time: str = "10"
) -> Path:
    run = RunDirectory(folder)
    run.logs.mkdir(parents=True)
    recipe = {"name": "a", "learning_rate": {"lr": lr}, "parallel": {"tensor_model_parallel_size": tp}}
    config = {"run_dir": str(folder), "recipe": recipe, "layout": {"tp": tp}, "provenance": {"created": folder.name}}
    run.run_json.write_text(json.dumps(config))
    # with --run_dir the snapshot lies in the run's own folder
    package = folder.with_name(f"{folder.name}.package")
    package.mkdir()
    (package / "one.py").write_text(code)
    (package / "two.py").write_text("y = 2\n")
    snapshot = snapshot_of(folder / "code", package=package)
    snapshot.store()
    run.jobs.write_text('{"job_id": "7", "time": 1, "cluster": null}\n')
    run.script.write_text(
        f"#!/bin/bash\n#SBATCH --time={time}\nexport MEGABATCH_RUN={folder}\n"
        f"# a reason\nexport VARIABLE='{variable}'\n"
        f"export MEGABATCH_CODE={snapshot.path}\nsrun python\n"
    )
    return folder


def diff(a: Path, b: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["diff", str(a), str(b), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_kind_of_difference_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = made(tmp_path / "a")
    b = made(tmp_path / "b", lr=0.2, tp=2, variable="two words", code="x = 2\n", time="20")
    found = diff(a, b, capsys, "--code")
    assert found["config"] == {"learning_rate.lr": [0.1, 0.2], "parallel.tensor_model_parallel_size": [1, 2]}
    assert found["derived"] == {"layout.tp": [1, 2]}
    assert found["environment"] == {"VARIABLE": ["1", "two words"]}
    assert found["code"] == ["megabatch/one.py"] and not found["code_note"]
    assert [line for line in found["code_diff"] if line[:1] in "+-"][2:] == ["-x = 1", "+x = 2"]
    changed = [line for line in found["script"] if line[:1] in "+-"][2:]
    assert changed == ["-#SBATCH --time=10", "+#SBATCH --time=20"]
    assert main(["diff", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "learning_rate.lr                     0.1  ->  0.2" in text and "+#SBATCH --time=20" in text


def test_the_versions_that_ranks_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    RunDirectory(a).heartbeat.write_text(json.dumps({"versions": {"torch": "2.8.0", "megatron-core": "0.17.0"}}))
    assert not diff(a, b, capsys)["environment"], "nothing is known of a run that has not started"
    RunDirectory(b).heartbeat.write_text(json.dumps({"versions": {"torch": "2.9.1", "megatron-core": "0.17.0"}}))
    assert diff(a, b, capsys)["environment"] == {"versions.torch": ["2.8.0", "2.9.1"]}


def test_the_same_run_in_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    assert main(["diff", str(a), str(b)]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_secrets_and_missing_snapshots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "open sesame")
    a, b = made(tmp_path / "a", variable="open sesame"), made(tmp_path / "b")
    RunDirectory(b).script.unlink()
    RunDirectory(b).jobs.write_text('{"job_id": "local", "attempt": 0, "start": 1}\n')
    found = diff(a, b, capsys)
    assert found["environment"]["VARIABLE"] == ["…", None]
    assert (
        found["code_note"] == "not compared: the second run ran on this machine, from the checkout"
        and found["script"] == []
    )
