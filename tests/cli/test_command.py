"""The `megabatch` command on run directories, with and without a Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.errors import LaunchError
from megabatch.insight.curves import final_history
from megabatch.run_directory import RunDirectory
from megabatch.slurm.cluster import PrivateCluster

RECIPES = Path(__file__).parents[2] / "recipes"


def _run(folder: Path, *, state: str, age_s: float = 0, step: int = 7) -> Path:
    """A run directory as a local run leaves it."""
    run = RunDirectory(folder)
    run.logs.mkdir(parents=True)
    run.run_json.write_text("{}")
    beat = {"time": time.time() - age_s, "step": step, "state": state, "job_id": None, "attempt": 0}
    run.heartbeat.write_text(json.dumps(beat))
    run.rank_log(0, 0).write_text("first\nsecond\n")
    run.rank_log(1, 0).write_text("other\n")
    return folder


def test_without_a_command_it_lists_them_and_it_knows_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "why a run failed" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"megabatch {version('megabatch')}\n"


def test_status_lists_runs_below_the_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _run(tmp_path / "megatron_output" / "a" / "v0-1", state="done")
    _run(tmp_path / "megatron_output" / "b" / "v0-1", state="failed", age_s=7300)
    assert main(["status"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["RUN", "STATE", "STEP", "LOSS", "TOK/S", "ETA", "GOODPUT", "JOB", "HEARD", "WHY"]
    assert ["completed" in lines[0], "failed" in lines[1], "2 h 02 min" in lines[1]] == [True] * 3


def test_status_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "x", state="running", step=41)
    assert main(["status", "--json", str(run)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["step"]) == (str(run), "running", 41)


def test_a_cancelled_run_that_saved_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    run = RunDirectory(_run(tmp_path / "x", state="stopped", age_s=7300))
    lines = (
        {"job_id": "987654", "time": 1.0, "cluster": None},
        {"job_id": "987654", "attempt": 0, "start": 2, "nodes": "n1"},
        {"job_id": "987654", "attempt": 0, "exit_code": 75, "time": 3, "cancelled": True},
    )
    run.jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["status", str(run.path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "cancelled" in line and line.rstrip().endswith("exit code 75 (saved)")


def test_status_without_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert "no runs in megatron_output" in capsys.readouterr().out


def test_an_empty_log_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "run", state="done")
    RunDirectory(run).rank_log(0, 0).write_text("")
    assert main(["logs", str(run)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and "that log is empty so far; `--rank batch` shows the job's own" in said.err


def test_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "outer" / "x", state="done")
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == "first\nsecond\n"
    assert main(["logs", "--rank", "1", "-f", str(tmp_path / "outer")]) == 0, "the only run below a folder"
    assert capsys.readouterr().out == "other\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["logs", "{run}", "--rank", "9"], "no log of rank 9"),
        (["logs", "{run}", "--rank", "first"], "must be a number or `batch`"),
        (["cancel", "{run}"], "no job was submitted"),
        (["resume", "{run}"], "completed"),
        (["status", "{near}"], "nearest in"),
        (["plan", "{near}"], "does not exist"),
    ],
)
def test_mistakes_get_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"run": _run(tmp_path / "quickstart", state="done"), "near": tmp_path / "quickstrat"}
    assert main([argument.format(**places) for argument in arguments]) == (2 if arguments[0] == "plan" else 1)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_run_without_a_script_is_submitted_by_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(_run(tmp_path / "x", state="failed"))]) == 1
    assert "submit its recipe instead" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--jsno"]) == 2
    assert "--jsno" in capsys.readouterr().err


def test_plan_shows_a_recipe_with_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "qwen3_moe_sft.py"), "--nodes", "2", "--global_batch_size", "8"]) == 0
    assert "world 16 = tp 4 x pp 2 x cp 1 x dp 2" in capsys.readouterr().out
    assert main(["plan", str(RECIPES / "qwen3_moe_sft.py"), "--nodes", "0"]) == 2


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = "import sys\nfrom megabatch.cli.command import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted(m for m in sys.modules if m.startswith('megabatch.') and m.count('.') == 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "megabatch.slurm" not in loaded and "megabatch.entry" not in loaded and "megabatch.cli" in loaded


def _megabatch(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "megabatch.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise LaunchError(done.stdout + done.stderr)
    return done.stdout


def _until(condition: Callable[[], bool], run: Path, *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, _logs(run)
        time.sleep(0.3)


def _state(run: Path) -> str:
    return str(json.loads(_megabatch("status", "--json", run, cwd=run.parent))[0]["state"])


def _last_step(run: Path) -> int:
    """Of the newest line of metrics.jsonl; -1 before the first."""
    metrics = RunDirectory(run).metrics
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def _logs(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "logs").glob("*.log")))


@pytest.mark.slurm
def test_submit_cancel_resume_on_slurm(slurm: PrivateCluster, tmp_path: Path) -> None:
    """What a user does, on two real nodes: a cancelled run saves, and its resumed job trains on to the end."""
    flags = ["--nodes", "2", "--tasks_per_node", "1", "--train_iters", "20000", "--run_dir", "run", "--lr_decay_iters"]
    recipe = [sys.executable, RECIPES / "quickstart.py", *flags, "20000", "--eval_iters", "0", "--submit"]
    done = subprocess.run(recipe, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert "submitted job" in done.stdout and f"megabatch logs -f {run}" in done.stdout
    again = subprocess.run(recipe, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "cancel it first" in again.stderr

    _until(lambda: _last_step(run) >= 1, run)
    assert "cancelled job" in _megabatch("cancel", run, cwd=tmp_path)
    _until(lambda: _state(run) == "cancelled", run)
    saved = int(RunDirectory(run).latest.read_text().strip().removeprefix("step_"))
    assert "resumes" in _megabatch("resume", run, cwd=tmp_path)
    _until(lambda: _last_step(run) > saved, run)
    assert f"step_{saved:08d}" in _megabatch("logs", run, cwd=tmp_path)
    _megabatch("cancel", run, cwd=tmp_path)
    _until(lambda: _state(run) == "cancelled", run)
    # what goodput counts: the steps of the final history, over two jobs
    steps, _ = final_history(RunDirectory(run).metrics)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert {line["attempt"] for line in steps} == {0, 1}
    assert steps[-1]["trained_s"] == pytest.approx(sum(line["step_s"] for line in steps))
    (found,) = json.loads(_megabatch("status", "--json", run, cwd=tmp_path))
    assert 0 < found["goodput"] < 1 and found["attempts"] == 2
