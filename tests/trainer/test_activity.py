"""A rank that hangs says where, whatever it hangs in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
STUCK = """
import ctypes, sys
from megabatch.trainer.activity import Activity
activity = Activity(rank=3)
activity.listen()
activity.at("training", 7)
def hang():
    print("hangs", flush=True)
    while True:
        ctypes.{library}(None).sleep(60)
hang()
"""


def _read_until(file: IO[str] | None, words: str) -> str:
    assert file is not None
    said = ""
    while words not in said:
        said += (line := file.readline())
        assert line, said
    return said


@pytest.mark.parametrize(("library", "answers"), [("CDLL", True), ("PyDLL", False)])
def test_stacks_come_out_of_calls_that_do_not_return(library: str, answers: bool) -> None:
    """A PyDLL's functions hold Python's lock: no thread runs beside them."""
    rank = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(library=library)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert rank.stdout is not None and rank.stdout.readline() == "hangs\n"
        while Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)  # until it sleeps in the call
        rank.send_signal(signal.SIGUSR1)
        said = _read_until(rank.stderr, "rank 3 is at step" if answers else "in hang")
    finally:
        rank.kill()
    said += rank.communicate()[1]
    assert "line 10 in hang" in said and "(most recent call first)" in said
    assert ("rank 3 is at step 7, training, for" in said) == answers
