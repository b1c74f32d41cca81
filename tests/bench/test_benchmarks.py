"""Every benchmark still runs: at toy size, once, in a process as `make bench` starts it. No time is asserted."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from megabatch.slurm.cluster import missing_programs

RUN = Path(__file__).with_name("run.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BENCH_TOY": "1"}
    command = [sys.executable, str(RUN), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_benchmark_gives_figures(tmp_path: Path) -> None:
    names = re.search(r"there are (.+)", run("nothing").stderr)
    assert names is not None
    wanted = set(names[1].split(", ")) - {"demo", "server_sync"}  # other tests start what these start
    wanted -= {"requeue"} if missing_programs() else set()
    done = run(*sorted(wanted), "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["benchmarks"]
    assert wanted == {name for name, result in found.items() if result["figures"]}
    for result in found.values():
        assert all(math.isfinite(figure["value"]) for figure in result["figures"])
