"""`megabatch rehearse RECIPE.py [flags]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megabatch.cli.plan import load_recipe
from megabatch.rehearse.command import Settings, rehearse


def rehearse_recipe(path: Path, flags: Sequence[str], *, steps: int, seed: int, folder: Path | None) -> int:
    """Exit code: 0 where the recipe resumes exactly. Raises: MegabatchError."""
    return rehearse(load_recipe(path)(), path, flags, Settings(steps=steps, seed=seed, folder=folder))
