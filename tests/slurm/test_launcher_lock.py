"""One launcher at a time in a run directory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch.run_directory import RunDirectory
from megabatch.slurm.launcher_lock import LockedError, launcher_lock

_HOLD = """
import sys, time
from pathlib import Path
from megabatch.run_directory import RunDirectory
from megabatch.slurm.launcher_lock import launcher_lock
with launcher_lock(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_one_is_told_at_once_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match="another launcher"), launcher_lock(run):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    with launcher_lock(run):
        pass
    assert not list(tmp_path.iterdir())
