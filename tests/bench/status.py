"""`megabatch status` over a thousand runs: their files are copies of what launcher and trainer wrote."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, Figure, alternated, environment, median, sized

from megabatch.run_directory import RunDirectory
from megabatch.slurm.records import record_submission

RUNS, STEPS, TIMES = sized((1000, 2000, 5), (10, 20, 1))


def status() -> list[Figure]:
    """Of runs with 2,000 logged steps each, half of which must be asked about."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        _make(folder)
        command = [sys.executable, "-m", "megabatch.cli", "status", str(folder / "runs")]
        (costs,) = alternated([command], times=TIMES)
        size = RunDirectory(folder / "runs" / "0").metrics.stat().st_size / 2**20
    note = f"wall, median of {TIMES}; {RUNS} runs with {size:.1f} MiB of metrics each"
    return [
        Figure(name="status of 1,000 runs", value=median([c.wall_s for c in costs]), unit="s", target=1.0, note=note),
        Figure(name="status of 1,000 runs, processor", value=median([c.cpu_s for c in costs]), unit="s"),
    ]


def _make(folder: Path) -> None:
    """One real run of a few steps; its files again and again, its metrics repeated to their length."""
    made = RunDirectory(folder / "made")
    recipe = [
        sys.executable,
        str(ROOT / "recipes" / "quickstart.py"),
        "--local",
        "--train_iters",
        str(sized(20, 6)),
        "--eval_iters",
        "0",
    ]
    subprocess.run([*recipe, "--run_dir", str(made.path)], env=environment(), check=True, capture_output=True)
    lines = made.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(lines * (STEPS // len(lines) + 1)), encoding="utf-8")
    for number in range(RUNS):
        run = RunDirectory(folder / "runs" / str(number))
        run.path.mkdir(parents=True)
        shutil.copyfile(made.run_json, run.run_json)
        # half of them have been resumed, and Slurm must say what became of that
        shutil.copyfile(made.jobs, run.jobs)
        if number % 2:
            record_submission(run, str(number))
        shutil.copyfile(made.heartbeat, run.heartbeat)
        run.metrics.hardlink_to(metrics)
