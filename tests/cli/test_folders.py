"""Commands on folders of runs: sweeps by `SWEEP/*`, chains of commands, and what lies beside runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.cli.runs import all_runs
from megabatch.run_directory import RunDirectory
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.render import render
from megabatch.table import table, text_width

ENDED = '{"job_id": "local", "attempt": 0, "start": 1, "nodes": "here"}\n'


def made(folder: Path, *, code: int, training: bool = True) -> Path:
    run = RunDirectory(folder)
    run.logs.mkdir(parents=True)
    if training:
        run.run_json.write_text(json.dumps({"recipe": {"name": folder.name}}))
    run.jobs.write_text(f'{ENDED}{{"job_id": "local", "attempt": 0, "exit_code": {code}, "time": 2}}\n')
    run.rank_log(0, 0).write_text("RuntimeError: it broke\n" if code else "fine\n")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for name, code in (("a", 0), ("b", 70), ("c", 70)):
        made(folder / name, code=code)
    for name in ("arrays/0", "cache", "code"):
        (folder / name).mkdir(parents=True)
    (folder / "sweep.json").write_text("{}")
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Of commands alone: there is no run.json."""
    folder = tmp_path / "chain"
    for name, code in (("first", 0), ("second", 3)):
        made(folder / name, code=code, training=False)
    steps = [{"name": n, "kind": "command", "after": [], "links": 1, "definition": None} for n in ("first", "second")]
    (folder / "chain.json").write_text(json.dumps({"name": "c", "steps": steps}))
    return folder


def test_everything_in_a_sweeps_folder_means_its_runs(sweep: Path) -> None:
    assert sorted(all_runs(sorted(sweep.iterdir()))) == [sweep / name for name in "abc"]
    assert sorted(all_runs([sweep, sweep / "a"])) == [sweep / name for name in "abc"], "each once"


def test_cancel_of_everything_in_a_sweeps_folder(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", *map(str, sorted(sweep.iterdir()))]) == 1
    assert "none of the 3 runs is in the queue" in capsys.readouterr().err


def test_a_folder_that_holds_no_run_is_still_named(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", str(sweep / "cache")]) == 1
    assert f"{sweep / 'cache'} is not a run directory" in capsys.readouterr().err


def test_why_of_a_sweep_tells_of_each_failed_run(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(sweep)]) == 0
    told = capsys.readouterr().out
    assert [f"{sweep / name} is failed" in told for name in "abc"] == [False, True, True]
    assert main(["why", str(sweep), "--json"]) == 0
    assert [one["run"] for one in json.loads(capsys.readouterr().out)] == [str(sweep / "b"), str(sweep / "c")]
    assert main(["why", str(sweep), "--attempt", "0"]) == 1
    assert "holds 3 runs; name one" in capsys.readouterr().err


def test_why_of_a_sweep_without_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        made(tmp_path / name, code=0)
    assert main(["why", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "none of the 2 runs has failed\n"


def test_a_chain_of_commands_is_a_folder_of_runs(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(chain), "--json"]) == 0
    found = [(Path(one["run"]).name, one["state"]) for one in json.loads(capsys.readouterr().out)]
    assert found == [("first", "completed"), ("second", "failed")]
    assert main(["why", str(chain)]) == 0
    assert f"{chain / 'second'} is failed" in capsys.readouterr().out
    page = chain / "report.html"
    assert main(["report", str(chain), "-o", str(page)]) == 0
    assert "2 runs" in capsys.readouterr().out and "second" in page.read_text()


@pytest.mark.parametrize(
    ("links", "fix"), [(1, "megabatch resume goes on"), (2, "megabatch resume --chain N goes on")]
)
def test_a_run_whose_jobs_are_used_up_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], links: int, fix: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without Slurm
    monkeypatch.setenv("COLUMNS", "200")
    run = RunDirectory(made(tmp_path / "run", code=75))
    run.jobs.write_text(run.jobs.read_text().replace('"local"', '"7"'))
    run.script.write_text(render(JobSpec(name="j", run_directory=run.path, links=links), ClusterProfile()))
    assert main(["status", str(run.path)]) == 0
    assert f"saved; {fix}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "columns"),
    [("abc", 3), ("é", 1), ("e\u0301", 1), ("漢字", 4), ("ｆｕ", 4), ("한글", 4), ("a🎉", 3), ("\u200b", 0)],
)
def test_widths_on_a_terminal(text: str, columns: int) -> None:
    assert text_width(text) == columns


def test_columns_stand_beneath_each_other_whatever_the_script() -> None:
    rows = [("漢字", "1", "x"), ("plain", "2", "y"), ("한글 run", "3", "z")]
    lines = table(("NAME", "N", "X"), rows).splitlines()
    assert len({text_width(line) for line in lines}) == 1
    cut = table(("NAME", "N", "WHY"), [("漢" * 40, "1", "字" * 40)], width=60)
    assert all(text_width(line) <= 60 for line in cut.splitlines()) and "…" in cut
