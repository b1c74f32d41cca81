"""`megabatch check RECIPE.py [flags]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megabatch.cli.recipe_file import as_declared, load_recipe
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError
from megabatch.rehearse.check import Settings, check


def check_recipe(path: Path, flags: Sequence[str], *, steps: int, folder: Path | None) -> int:
    """Exit code: 0 where the recipe's layout computes what one process computes. Raises: MegabatchError."""
    recipe = as_declared(load_recipe(path), path)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path} declares a chain; check the recipe file of one of its training steps")
    return check(recipe, path, flags, Settings(steps=steps, folder=folder))
