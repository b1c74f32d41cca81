"""`megabatch check RECIPE.py`: a small version with the recipe's layout computes what one process computes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError
from megabatch.rehearse.closeness import Closeness, closeness
from megabatch.rehearse.interruptions import uninterrupted
from megabatch.rehearse.reference import comparable, in_one_process
from megabatch.rehearse.runs import most_ranks, opened, prepared, require, say_what, shape_of
from megabatch.rehearse.shrink import shrink
from megabatch.run_directory import ExitCode
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a recipe is checked."""

    steps: int = 4
    folder: Path | None = None
    """Folder that keeps both runs for inspection; None uses a temporary folder, kept only if they differ."""


def check(recipe: Recipe, recipe_file: Path, flags: Sequence[str], settings: Settings) -> int:
    """Prints a table of the comparisons; 0 when all agree up to rounding. Raises: MegabatchError."""
    if settings.steps < 2:
        raise ConfigError("--steps must be at least 2: gradients are read from the step after the first")
    chosen, whole = opened(recipe, recipe_file, flags)
    small = comparable(shrink(chosen, shape_of(whole), steps=settings.steps, max_ranks=most_ranks()))
    folder = settings.folder or Path(tempfile.mkdtemp(prefix="megabatch-check-"))
    layout = prepared(small.recipe, recipe_file, folder / "layout")
    alone = prepared(in_one_process(small.recipe), recipe_file, folder / "one_process")
    say_what("checking", small, whole)
    for job, what in ((alone, "one process"), (layout, f"{layout.world_size} processes, the recipe's layout")):
        require(uninterrupted(job), ExitCode.DONE, job, f"{what}, {settings.steps} steps")
    found = closeness(layout.files, alone.files, steps=settings.steps)
    same = all(one.passes for one in found)
    for one in found:
        print(_line(one))
    verdict = "computes what one process computes" if same else f"DOES NOT COMPUTE THE SAME; both runs are in {folder}"
    print(f"{chosen.name}: {verdict}")
    if same and settings.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if same else 1


def _line(one: Closeness) -> str:
    verdict = f"within {one.allowed:.0e}" if one.passes else f"NOT within {one.allowed:.0e}: {one.at}"
    return f"  {one.what:56} {one.largest:.1e}, {verdict}"
