"""`megabatch plan RECIPE.py [flags]`: the recipe file's own plan, without running the file as a program."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megabatch import entry
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError


def show_plan(path: Path, flags: Sequence[str]) -> int:
    """Prints the plan and returns the exit code of the recipe's command line."""
    try:
        entry.main(load_recipe(path), list(flags))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def load_recipe(path: Path) -> Callable[[], Recipe]:
    """The function `recipe` of a recipe file. Raises: ConfigError when there is no such file or function."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the path of a recipe file")
    spec = importlib.util.spec_from_file_location(f"megabatch_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; give the path of a recipe file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = getattr(module, "recipe", None)
    if not callable(found):
        raise ConfigError(f"{path} has no function `recipe` that returns a Recipe")
    return found
