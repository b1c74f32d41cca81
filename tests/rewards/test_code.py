"""The code reward: shares of tests, and programs that would do harm."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from megabatch.errors import RewardError
from megabatch.rewards.code import Code, program_in
from megabatch.rewards.sample import RewardSample
from megabatch.rewards.sandbox import lacking, run

CODE = Code(seconds=60, memory_mib=512, at_a_time=2)


def sample(program: str, **columns: Any) -> RewardSample:
    return RewardSample(
        key="1/2/3", prompt=[], completion=f"Here:\n```python\n{program}\n```\nDone.", ids=(), columns=columns
    )


def score(*samples: RewardSample) -> list[float]:
    return list(CODE.open()(samples))


def test_the_share_of_asserts_that_hold() -> None:
    tests = ["assert double(2) == 4", "assert double(0) == 0", "assert double('a') == 5"]
    good, early = "def double(x):\n    return x * 2", "import sys\ndef double(x): sys.exit(0)"
    assert score(sample(good, tests=tests), sample(early, tests=tests)) == pytest.approx([2 / 3, 0])


def test_standard_input_and_output() -> None:
    pairs = {"inputs": ["2 3\n", "1 1\n"], "outputs": ["5\n", "3"]}
    adds = "a, b = map(int, input().split())\nprint(a + b, ' ')"
    assert score(sample(adds, input_output=pairs), sample(adds, input_output=json.dumps(pairs))) == [0.5, 0.5]


def test_the_last_program_counts() -> None:
    assert program_in("```\nx = 1\n```\nand\n```py\nx = 2\n```\n```json\n{}\n```") == "x = 2\n"
    assert program_in("no code") is None
    assert score(RewardSample(key="0", prompt=[], completion="none", ids=(), columns={"tests": "assert 1"})) == [0.0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"level": 1}, "code needs the column 'tests' or 'input_output', and the row of sample 1/2/3 has level"),
        ({"input_output": {"inputs": ["1"]}}, "code: 'input_output' of sample 1/2/3 must be an object with lists"),
    ],
)
def test_a_row_without_tests_is_named(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(RewardError) as raised:
        score(sample("x = 1", **columns))
    assert str(raised.value).startswith(said)


def test_a_program_that_hangs_or_takes_all_memory_is_ended() -> None:
    assert run("while True: pass", seconds=1, memory_mib=512).code not in (0, 1)
    assert run("import time; time.sleep(60)", seconds=1, memory_mib=512).code is None
    done = run("x = bytearray(900 * 2**20)", seconds=60, memory_mib=512)
    assert done.code == 1 and "MemoryError" in done.errors


def test_a_program_sees_neither_the_environment_nor_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    done = run("import os; print(sorted(os.environ), os.listdir('.'))", seconds=60, memory_mib=512)
    assert "HF_TOKEN" not in done.output and "program.py" in done.output


@pytest.mark.skipif("writing files of the run's user" in lacking(), reason="this kernel has no Landlock")
def test_a_program_cannot_touch_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    program = f"""
import os
for act in (lambda: open({str(tmp_path / "mine.txt")!r}, "w"), lambda: os.remove({str(tmp_path / "mine.txt")!r}),
            lambda: open({str(tmp_path / "new.txt")!r}, "w"), lambda: os.mkdir({str(tmp_path / "folder")!r})):
    try:
        act()
        print("done")
    except PermissionError:
        print("refused")
open("here.txt", "w").write("fine")
print(open("here.txt").read())
"""
    done = run(program, seconds=60, memory_mib=512)
    assert done.output.split() == ["refused"] * 4 + ["fine"], done.errors
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.skipif("using the network" in lacking(), reason="this system forbids namespaces")
def test_a_program_reaches_no_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=60)"
        done = run(program, seconds=60, memory_mib=512)
    assert done.code == 1 and "Error: [Errno" in done.errors, done.errors


@pytest.mark.skipif("using the network" in lacking(), reason="this system forbids namespaces")
def test_nothing_that_a_program_starts_outlives_it(tmp_path: Path) -> None:
    program = """
import os, time
if not os.fork():
    os.setsid()
    time.sleep(600)
print(os.getpid())
"""
    done = run(program, seconds=60, memory_mib=512)
    assert done.code == 0 and done.output.split() == ["1"], "the first process of its namespace"
