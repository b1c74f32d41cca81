"""Sweeps: a table of 18 layouts, and 256 runs given to a private Slurm as one array."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, Figure, alternated, command_cost, median, sized

from megabatch.slurm.cluster import PrivateCluster, missing_programs

LAYOUTS = ROOT / "recipes" / "sweeps" / "qwen3_moe_layouts.py"
SMALL = ROOT / "recipes" / "quickstart.py"
ELEMENTS = sized(256, 4)
TIMES = sized(5, 1)


def array() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        (costs,) = alternated([[sys.executable, str(LAYOUTS), "--dry_run"]], times=TIMES, cwd=Path(folder))
        figures = [
            Figure(
                name="dry run of 18 layouts, processor", value=median([c.cpu_s for c in costs]), unit="s", target=0.35
            )
        ]
        return figures if missing_programs() else figures + _submission(Path(folder))


def _submission(folder: Path) -> list[Figure]:
    """Whole processes, each in a folder of its own, to a cluster whose nodes are kept from starting anything."""
    cluster = PrivateCluster.start(nodes=1, directory=folder / "slurm")
    before = dict(os.environ)
    os.environ.update(cluster.environment)
    calls = _counted(folder)
    try:
        subprocess.run(["scontrol", "update", "PartitionName=batch", "State=DOWN"], check=True)
        seeds = ",".join(map(str, range(ELEMENTS)))
        costs, bare = [], []
        for turn in range(TIMES + 1):
            bare.append(_bare_files(folder / f"bare{turn}"))
            # code that was submitted before is not stored again; disks go on deleting for seconds, so nothing is
            sweep = ["--sweep", f"seed={seeds}", "--save", str(folder / "save")]
            command = [sys.executable, str(SMALL), "--submit", *sweep]
            costs.append(command_cost(command, cwd=folder))
            (folder / "save" / SMALL.stem).rename(folder / f"sweep{turn}")
        submitted = calls.read_text().count("submit\n") / len(costs)
    finally:
        cluster.stop()
        os.environ.clear()
        os.environ.update(before)
    name = f"submit an array of {ELEMENTS}"
    return [
        Figure(name=name, value=median([c.wall_s for c in costs[1:]]), unit="s", target=1, note="wall, median of 5"),
        Figure(name=f"{name}, processor", value=median([c.cpu_s for c in costs[1:]]), unit="s"),
        Figure(name=f"{name}, its files alone", value=median(bare[1:]), unit="s", note="as many, as large, made bare"),
        Figure(name=f"{name}, calls of sbatch", value=submitted, unit="x", target=1),
    ]


def _bare_files(folder: Path) -> float:
    """Seconds that the disk takes for as many folders and files, of their usual sizes."""
    begin = time.perf_counter()
    for element in range(ELEMENTS):
        place = folder / str(element)
        place.mkdir(parents=True)
        for name, size in (("run.json", 14_000), ("job.sbatch", 9_000), ("jobs.jsonl", 70)):
            (place / name).write_bytes(b" " * size)
    return time.perf_counter() - begin


def _counted(folder: Path) -> Path:
    """Puts an sbatch before the real one that notes each call; asking when a job would start is another matter."""
    real, calls = shutil.which("sbatch"), folder / "calls"
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --test-only ] && echo test >>{shlex.quote(str(calls))} || '
        f'echo submit >>{shlex.quote(str(calls))}\nexec {shlex.quote(str(real))} "$@"\n'
    )
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    return calls
