"""`megabatch rehearse RECIPE.py`: runs a small version twice, once with a stop and a kill, and compares the two."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError
from megabatch.rehearse.compare import Verdict, compare
from megabatch.rehearse.interruptions import killed, moments, stopped, uninterrupted
from megabatch.rehearse.runs import most_ranks, opened, prepared, require, say_what, shape_of
from megabatch.rehearse.shrink import shrink
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a recipe is rehearsed."""

    steps: int = 20
    seed: int = 0
    """Decides when the run is stopped and killed, and which rank dies."""
    folder: Path | None = None
    """Folder that keeps both runs for inspection; None uses a temporary folder, kept only if they differ."""


def rehearse(recipe: Recipe, recipe_file: Path, flags: Sequence[str], settings: Settings) -> int:
    """Prints the verdict; 0 when the resumed run equals the uninterrupted one. Raises: MegabatchError."""
    if settings.steps < 12:
        raise ConfigError("--steps must be at least 12, to leave room for a stop and a kill")
    chosen, whole = opened(recipe, recipe_file, flags)
    small = shrink(chosen, shape_of(whole), steps=settings.steps, max_ranks=most_ranks())
    folder = settings.folder or Path(tempfile.mkdtemp(prefix="megabatch-rehearsal-"))
    jobs = [prepared(small.recipe, recipe_file, folder / name) for name in ("uninterrupted", "resumed")]
    say_what("rehearsing", small, whole)
    verdicts = _run(jobs[0], jobs[1], settings)
    same = all(verdict.difference is None for verdict in verdicts)
    for verdict in verdicts:
        print(f"  {verdict.what:56} {verdict.difference or 'equal, bit for bit'}")
    print(f"{chosen.name}: {'resumes bit for bit' if same else f'DOES NOT RESUME EXACTLY; both runs are in {folder}'}")
    if same and settings.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if same else 1


def _run(whole: JobSpec, resumed: JobSpec, settings: Settings) -> list[Verdict]:
    stop, kill, rank = moments(settings.steps, ranks=whole.world_size, seed=settings.seed)
    require(uninterrupted(whole), ExitCode.DONE, whole, f"uninterrupted, {settings.steps} steps")
    require(stopped(resumed, step=stop), ExitCode.REQUEUE, resumed, f"asked to stop after step {stop}")
    require(killed(resumed, step=kill, rank=rank), 137, resumed, f"resumed; rank {rank} killed after step {kill}")
    require(uninterrupted(resumed), ExitCode.DONE, resumed, "resumed, to the end")
    return compare(whole.files, resumed.files, steps=settings.steps)
