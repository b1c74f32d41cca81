"""`megabatch status --watch` in a terminal of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.run_directory import RunDirectory
from megabatch.table import amount, duration, table

COLUMNS = 100


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / ("a folder with a name too long for any terminal's table " * 2) / "run")
    run.path.mkdir(parents=True)
    run.run_json.write_text("{}")
    beat(run, 7)
    return run


def beat(run: RunDirectory, step: int) -> None:
    words = {"time": time.time(), "step": step, "train_iters": 500, "state": "running", "job_id": None, "attempt": 0}
    run.heartbeat.write_text(json.dumps(words))


class Terminal:
    """The other end of a pseudo-terminal."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master, self.process, self.seen = master, process, ""

    def until(self, text: str, *, timeout_s: float = 100) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536).decode()

    def end(self) -> int:
        """Exit code, after all that was written was read."""
        self.until("\x1b[?1049l")
        return self.process.wait(60)


@contextmanager
def watching(run: RunDirectory) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 12, COLUMNS, 0, 0))
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "megabatch.cli", "status", "--watch", str(run.path)]

    def own() -> None:
        """Makes it the controlling terminal, so that Ctrl-C is a signal, and one that is not ignored."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=own,  # noqa: PLW1509
    )
    try:
        yield Terminal(master, process)
        assert termios.tcgetattr(slave) == before, "the terminal is left as it was"
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_it_draws_again_and_ends_on_q(run: RunDirectory) -> None:
    with watching(run) as terminal:
        terminal.until("7/500")
        beat(run, 8)
        terminal.until("8/500")
        os.write(terminal.master, b"q")
        assert terminal.end() == 0
    pictures = terminal.seen.split("\x1b[H")
    lines = [re.sub(r"\x1b\[\??[\d;]*[A-Za-z]", "", line) for picture in pictures for line in picture.split("\r\n")]
    assert max(len(line) for line in lines if "/500" in line) <= COLUMNS


def test_ctrl_c_ends_it_too(run: RunDirectory) -> None:
    with watching(run) as terminal:
        terminal.until("7/500")
        os.write(terminal.master, b"\x03")
        assert terminal.end() in (130, -signal.SIGINT)


def test_without_a_terminal_it_is_refused(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", str(run.path)]) == 1
    assert "needs a terminal" in capsys.readouterr().err


def test_tables_give_way_at_their_ends() -> None:
    rows = [("/long/path/of/a/run", "running", "a reason that goes on and on"), ("x", "failed", "")]
    lines = table(("RUN", "STATE", "WHY"), rows, width=44).splitlines()
    assert max(map(len, lines)) <= 44 and lines[1].startswith("/long/path/of/a/run  running  a reason that…")
    rows[0] = (rows[0][0] + "/of/an/unusual/depth", *rows[0][1:])
    wide = table(("RUN", "STATE", "WHY"), rows, width=60).splitlines()[1]
    assert wide == "…/run/of/an/unusual/depth  running  a reason that goes on a…", "the reason stays readable"
    rows[0] = ("/long/path/of/a/run", *rows[0][1:])
    assert table(("RUN", "STATE", "WHY"), rows, width=36).splitlines()[1] == "…ath/of/a/run  running  a reason th…"


def test_short_numbers() -> None:
    assert [duration(s) for s in (45, 720, 11100, 187200)] == ["45 s", "12 min", "3 h 05 min", "2 d 4 h"]
    assert [amount(v) for v in (950, 6134, 12345, 4.56e6)] == ["950", "6134", "12.3k", "4.56M"]
