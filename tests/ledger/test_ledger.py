"""The ledger: what is written is read, killed writers, resumed runs, the limit of disk space, and accounting."""

from __future__ import annotations

import math
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.errors import RewardError
from megabatch.ledger.reader import Reader
from megabatch.ledger.record import Record, Routes, decode, encode
from megabatch.ledger.segments import frames, segments
from megabatch.ledger.writer import Ledger


def record(key: str = "0/0/0", *, tokens: int = 5) -> Record:
    return Record(
        key=key,
        prompt="<user>2+2?",
        completion="four 四",
        prompt_ids=(1, 2, 3),
        ids=tuple(range(tokens)),
        logps=tuple(-0.5 * n for n in range(tokens)),
        versions=(7,) * tokens,
        mask=(1,) * (tokens - 1) + (0,) if tokens else (),
        finish="stop",
        rewards={"accuracy": 1.0, "judge": None},
        reward=1.0,
        advantage=-0.25,
        extra={"row": "train.jsonl:4"},
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(), st.lists(st.floats(width=32, allow_nan=False), max_size=6)), max_size=4))
def test_records_come_back_as_they_were(given_: list[tuple[str, list[float]]]) -> None:
    records = [replace(record(tokens=len(logps)), completion=text, logps=tuple(logps)) for text, logps in given_]
    records[1:2] = [
        replace(one, routes=Routes(form="<i2", shape=(len(one.ids) + 3, 1, 1), data=b"\1\2" * (len(one.ids) + 3)))
        for one in records[1:2]
    ]
    assert list(decode(encode(records))) == records


def test_routes_are_lists_of_tokens_layers_and_experts() -> None:
    narrow = Routes(form="|u1", shape=(2, 3, 2), data=bytes(range(12)))
    assert narrow.to_lists() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert Routes(form="<i2", shape=(1, 1, 2), data=b"\x2c\x01\x01\x00").to_lists() == [[[300, 1]]]


def test_steps_come_back_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", max_bytes=2**30)
    for step in (1, 2, 3):
        ledger.write(step, [record(f"{step}/0/{n}") for n in range(step)])
    reader = Reader(tmp_path / "ledger")
    assert reader.steps == (1, 2, 3) and reader.records(2) == (record("2/0/0"), record("2/0/1"))
    account = reader.account()
    assert account.completions == 6 and not (account.absent or account.damaged or account.repeated)
    assert str(account).startswith("steps 1 to 3, 6 completions, ") and str(account).endswith("none absent or twice")
    with pytest.raises(RewardError, match="step 9 is not in the ledger, which has steps 1 to 3"):
        reader.records(9)


def test_a_completion_may_not_be_twice_in_a_step(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="completion 0/0/0 is twice in step 4"):
        Ledger(tmp_path, max_bytes=2**30).write(4, [record(), record()])


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, max_bytes=2**30)
    for step in (1, 2, 3):
        ledger.write(step, [record(f"{step}/0/0")])
    ledger = Ledger(tmp_path, max_bytes=2**30)
    ledger.write(2, [replace(record("2/0/0"), completion="another")])
    reader = Reader(tmp_path)
    assert reader.steps == (1, 2) and reader.records(2)[0].completion == "another"


_KILLED = """
import os, signal, sys
from pathlib import Path
from megabatch.ledger import segments, writer
from tests_record import record
ledger = writer.Ledger(Path(sys.argv[1]), max_bytes=2**30)
ledger.write(1, [record("1/0/0")])
frame = writer.packed(2, 1, writer.encode([record("2/0/0")]))
with open(ledger._file, "ab", buffering=0) as file:
    file.write(frame[: int(sys.argv[2])])
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("written", [1, 30, 60])
def test_a_killed_writer_costs_only_the_step_that_it_wrote(written: int, tmp_path: Path) -> None:
    (tmp_path / "tests_record.py").write_text(
        "from megabatch.ledger.record import Record\n"
        "def record(key):\n"
        "    return Record(key=key, prompt='', completion='', prompt_ids=(), ids=(1,) * 50, logps=(0.0,) * 50,\n"
        "                  versions=(0,) * 50, mask=(1,) * 50, finish='stop', rewards={}, reward=0.0, advantage=0.0)\n"
    )
    folder = tmp_path / "ledger"
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder), str(written)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), *filter(None, sys.path)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Reader(folder).steps == (1,), "a reader beside the killed writer sees whole steps only"
    before = segments(folder)[0].stat().st_size
    ledger = Ledger(folder, max_bytes=2**30)
    assert segments(folder)[0].stat().st_size == before - written
    ledger.write(2, [record("2/0/0")])
    assert Reader(folder).steps == (1, 2) and Reader(folder).records(2) == (record("2/0/0"),)


def test_the_oldest_steps_make_room(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, max_bytes=20_000)
    noise = [replace(record(f"0/0/{n}", tokens=0), completion=os.urandom(300).hex()) for n in range(4)]
    for step in range(1, 41):
        ledger.write(step, noise)
        assert sum(file.stat().st_size for file in segments(tmp_path)) <= 20_000
    reader = Reader(tmp_path)
    assert reader.steps[-1] == 40 and 1 not in reader.steps and len(reader.records(40)) == 4
    assert not reader.account().absent


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, max_bytes=2**30)
    for step in (1, 2, 4):
        ledger.write(step, [record(f"{step}/0/0")])
    file = segments(tmp_path)[0]
    content = bytearray(file.read_bytes())
    content[60] ^= 1
    file.write_bytes(content)
    account = Reader(tmp_path).account()
    assert account.damaged == (1,) and account.absent == (3,)
    assert "1 steps absent (first: 3), 1 steps damaged (first: 1)" in str(account)
    with pytest.raises(RewardError, match=r"step 1 of .* is damaged"):
        Reader(tmp_path).records(1)


def test_damage_costs_the_step_that_has_it_wherever_it_is(tmp_path: Path) -> None:
    """Each byte of the third of six frames: a reader and a writer that goes on keep the others."""
    ledger = Ledger(tmp_path, max_bytes=2**30)
    for step in range(1, 7):
        ledger.write(step, [record(f"{step}/0/0")])
    file = segments(tmp_path)[0]
    whole = file.read_bytes()
    third = list(frames(file))[2]
    for place in range(third.offset, third.end):
        content = bytearray(whole)
        content[place] ^= 0x55
        file.write_bytes(content)
        Ledger(tmp_path, max_bytes=2**30)
        assert file.stat().st_size == len(whole), f"byte {place}: nothing behind the damage is cut"
        reader = Reader(tmp_path)
        for step in (1, 2, 4, 5, 6):
            assert reader.records(step) == (record(f"{step}/0/0"),), (place, step)
        account = reader.account()
        assert (*account.absent, *account.damaged) == (3,), place


def test_frames_of_before_are_read_beside_those_of_today(tmp_path: Path) -> None:
    """Their header has no sum of its own."""
    body = zlib.compress(encode([record("1/0/0")]))
    before = struct.pack("<4sIIQI", b"MBL1", 1, 1, len(body), zlib.crc32(body)) + body
    tmp_path.joinpath("00000000.ledger").write_bytes(before)
    Ledger(tmp_path, max_bytes=2**30).write(2, [record("2/0/0")])
    reader = Reader(tmp_path)
    assert [reader.records(step) for step in reader.steps] == [(record("1/0/0"),), (record("2/0/0"),)]


def test_a_full_disk_costs_a_step_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path, max_bytes=2**30)
    ledger.write(1, [record("1/0/0")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (segments(tmp_path)[0].stat().st_size + 20, hard))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        ledger.write(2, [record("2/0/0")])
    finally:
        signal.signal(signal.SIGXFSZ, previous)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step 2 is missing from" in caplog.text
    ledger.write(3, [record("3/0/0")])
    assert Reader(tmp_path).steps == (1, 3)


def test_missing_rewards_are_none() -> None:
    (one,) = decode(encode([replace(record(), reward=math.nan, rewards={"a": math.nan, "b": 2.0})]))
    assert one.reward is None and one.rewards == {"a": None, "b": 2.0}


def test_no_ledger_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="has no completions"):
        Reader(tmp_path)


def test_logps_are_kept_as_fp32() -> None:
    (one,) = decode(encode([replace(record(tokens=1), logps=(-0.1,))]))
    assert one.logps[0] != -0.1 and math.isclose(one.logps[0], -0.1, rel_tol=6e-8)
