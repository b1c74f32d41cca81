"""`megabatch completions` and the page's completions, from a ledger as a run writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.ledger.record import Record, Routes
from megabatch.ledger.segments import frames, segments
from megabatch.ledger.writer import Ledger
from megabatch.run_directory import RunDirectory


def record(key: str, text: str, reward: float | None) -> Record:
    return Record(
        key=key,
        prompt="What is 2+2?",
        completion=text,
        prompt_ids=(1, 2),
        ids=(3, 4, 5),
        logps=(-1.0, -2.0, -3.0),
        versions=(6, 6, 7),
        mask=(1, 1, 0),
        finish="stop",
        rewards={"accuracy": reward, "judge": None},
        reward=reward,
        advantage=0.5,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    ledger = Ledger(RunDirectory(folder).ledger, max_bytes=2**30)
    ledger.write(1, [record("1/0/0", "early four", 0.25)])
    texts = [("four", 1.0), ("five\x1b[31m", 0.0), ("six", 0.5), ("no idea", None)]
    ledger.write(2, [record(f"2/0/{n}", text, reward) for n, (text, reward) in enumerate(texts)])
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main(["completions", *map(str, arguments)]) == code
    return capsys.readouterr().out


def test_the_newest_step_with_all_that_is_known(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, run)
    assert (
        "step 2  2/0/0  reward 1 (accuracy 1, judge -)  advantage +0.500  3 tokens, 2 in the loss  stop  policy 6-7"
        in text
    )
    assert "  prompt: What is 2+2?\n  completion: four\n" in text and "ledger: steps 1 to 2" in text
    assert "\x1b" not in text and "five\\x1b[31m" in text, "a completion may not steer the terminal"


def order(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines() if line.startswith("step ")]


def test_by_reward_with_those_without_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order(said(capsys, run, "--worst")) == ["2/0/1", "2/0/2", "2/0/0", "2/0/3"]
    assert order(said(capsys, run, "--best", "-n", 2)) == ["2/0/0", "2/0/2"]


def test_grep_looks_in_every_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order(said(capsys, run, "--grep", "f..r$")) == ["2/0/0", "1/0/0"]
    assert order(said(capsys, run, "--grep", "four", "--step", 1)) == ["1/0/0"]
    assert "no completion has 'seven'" in said(capsys, run, "--grep", "seven")


def test_json_has_the_tokens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, run, "--json", "-n", 1).splitlines()
    found = json.loads(line)
    assert found["step"] == 2 and found["ids"] == [3, 4, 5] and found["logps"] == [-1.0, -2.0, -3.0]


def test_check_reads_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "steps 1 to 2, 5 completions" in said(capsys, run, "--check")
    file = segments(RunDirectory(run).ledger)[0]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "1 steps damaged (first: 2)" in said(capsys, run, "--check", code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "9"], "step 9 is not in the ledger, which has steps 1 to 2"),
        (["--grep", "("], "--grep '(' is no regular expression"),
    ],
)
def test_mistakes_get_one_clear_error(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completions", str(run), *arguments]) != 0
    assert message in capsys.readouterr().err


def test_the_page_has_curves_of_rewards_and_the_best_and_worst(run: Path, tmp_path: Path) -> None:
    line = {"kind": "train", "loss": 1.0, "reward": 0.5, "reward_accuracy": 0.25, "reward_accuracy_sum": 2.0}
    line |= {"reward_accuracy_count": 8, "reward_std": 0.1, "completion_length": 3.0, "kl": 0.01, "staleness": 0.0}
    metrics = "".join(json.dumps(line | {"step": step}) + "\n" for step in (1, 2))
    RunDirectory(run).metrics.write_text(metrics)
    page = tmp_path / "report.html"
    assert main(["report", str(run), "-o", str(page)]) == 0
    text = page.read_text()
    for title in ("Reward", "Reward accuracy", "KL to the reference", "Completion length (tokens)"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "accuracy_sum" not in text and "Entropy" not in text, "charts without points are left out"
    rows = text.partition("Best and worst completions of")[2]
    assert 0 < rows.index(">four<") < rows.index(">six<") < rows.index("five")
    assert "no idea" not in rows


def test_json_has_the_experts_of_each_token(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routed = replace(record("3/0/0", "four", 1.0), routes=Routes(form="|u1", shape=(5, 1, 2), data=bytes(range(10))))
    Ledger(RunDirectory(run).ledger, max_bytes=2**30).write(3, [routed])
    found = json.loads(said(capsys, run, "--json"))
    assert found["step"] == 3 and found["routes"] == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]], [[8, 9]]]


def test_a_terminal_without_the_characters_gets_them_escaped(run: Path) -> None:
    Ledger(RunDirectory(run).ledger, max_bytes=2**30).write(3, [record("3/0/0", "答案 \ud800 是 四", 1.0)])
    command = [sys.executable, "-m", "megabatch.cli", "completions", str(run)]
    for encoding, shown in (("ascii", "\\u7b54\\u6848 \\xd800"), ("utf-8", "答案 \\xd800 是 四")):
        done = subprocess.run(
            command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True
        )
        assert shown in done.stdout.decode(encoding), done.stderr


def test_a_search_goes_on_behind_a_damaged_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = segments(RunDirectory(run).ledger)
    *_, last = frames(file)
    content = bytearray(file.read_bytes())
    content[last.end - 3] ^= 1
    file.write_bytes(content)
    assert main(["completions", str(run), "--grep", "four"]) == 0
    told = capsys.readouterr()
    assert "1/0/0" in told.out and "2/0/0" not in told.out
    assert "step 2 of" in told.err and "is damaged: its checksum differs; it is left out" in told.err
    assert main(["completions", str(run), "--step", "2", "--grep", "four"]) == 1
