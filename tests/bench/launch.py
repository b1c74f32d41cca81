"""What a person waits for before a run: a dry run, a recipe's import, the command line's help, a job's script."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from measure import ROOT, Figure, alternated, median, sized

from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.render import render

RECIPE = ROOT / "recipes" / "qwen3_moe_sft.py"
TIMES = sized(5, 1)


def dry_run() -> list[Figure]:
    """`python recipes/qwen3_moe_sft.py --dry_run`, whole process, from a folder with nothing in it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        (costs,) = alternated([[sys.executable, str(RECIPE), "--dry_run"]], times=TIMES, cwd=Path(folder))
    return [
        Figure(
            name="dry run", value=median([c.wall_s for c in costs]), unit="s", target=0.35, note="wall, median of 5"
        ),
        Figure(name="dry run, processor", value=median([c.cpu_s for c in costs]), unit="s", target=0.2),
    ]


def recipe_import() -> list[Figure]:
    """Executing a recipe file's code, and building its recipe, above a bare interpreter's start."""
    load = f"space = {{'__name__': 'recipe'}}; exec(compile(open({str(RECIPE)!r}).read(), 'r.py', 'exec'), space)"
    commands = [[sys.executable, "-c", code] for code in ("pass", load, f"{load}; space['recipe']()")]
    bare, imported, built = alternated(commands, times=2 * TIMES)
    return [
        Figure(
            name="recipe import",
            value=median([i.wall_s - b.wall_s for i, b in zip(imported, bare, strict=True)]),
            unit="s",
            target=0.1,
            note="wall above a bare interpreter, median of 10",
        ),
        Figure(
            name="recipe import and build",
            value=median([i.wall_s - b.wall_s for i, b in zip(built, bare, strict=True)]),
            unit="s",
        ),
        Figure(name="bare interpreter", value=median([b.wall_s for b in bare]), unit="s"),
    ]


def command_help() -> list[Figure]:
    """`--help` of `megabatch`, of `megabatch-convert` and of a recipe, which lists every parameter."""
    commands = [
        [sys.executable, "-m", "megabatch.cli", "--help"],
        [sys.executable, "-m", "megabatch.converters.command", "--help"],
        [sys.executable, str(RECIPE), "--help"],
    ]
    command, converter, recipe = alternated(commands, times=TIMES)
    return [
        Figure(
            name="megabatch-convert --help",
            value=median([c.wall_s for c in converter]),
            unit="s",
            target=0.15,
            note="wall, median of 5",
        ),
        Figure(name="megabatch --help", value=median([c.wall_s for c in command]), unit="s", note="wall, median of 5"),
        Figure(name="recipe --help", value=median([c.wall_s for c in recipe]), unit="s", note="wall, median of 5"),
    ]


def rendering() -> list[Figure]:
    """The batch script of one node and of 1,024, taken in turns."""
    one = JobSpec(name="bench", run_directory=Path("/runs/bench"), tasks_per_node=8, gpus_per_node=8)
    jobs = (one, replace(one, nodes=1024))
    profile = ClusterProfile(network="infiniband")
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(sized(50, 2)):
        for job, times in zip(jobs, seconds, strict=True):
            started = time.perf_counter()
            render(job, profile)
            times.append(time.perf_counter() - started)
    few, many = map(median, seconds)
    return [
        Figure(name="render, 1,024 nodes / 1 node", value=many / few, unit="x", target=1.2, note="median of 50"),
        Figure(name="render, 1 node", value=1000 * few, unit="ms"),
    ]
