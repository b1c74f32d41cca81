"""`megabatch plan RECIPE.py [flags]`: the recipe file's own plan, without running the file as a program."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from megabatch import entry
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError
from megabatch.sweep.declare import Sweep


def show_plan(path: Path, flags: Sequence[str]) -> int:
    """Prints the plan and returns the exit code of the recipe's command line."""
    try:
        entry.main(load_declared(path), list(flags))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def load_declared(path: Path) -> Callable[[], Recipe] | Sweep:
    """The sweep that a recipe file declares, else its function `recipe`.

    Raises: ConfigError when there is no such file, neither of both, or more than one sweep.
    """
    names = vars(module := _loaded(path))
    sweeps = [name for name, value in names.items() if isinstance(value, Sweep)]
    if len(sweeps) > 1:
        raise ConfigError(f"{path} declares {len(sweeps)} sweeps ({', '.join(sweeps)}); run the file itself")
    return names[sweeps[0]] if sweeps else _recipe(module, path)


def load_recipe(path: Path) -> Callable[[], Recipe]:
    """The function `recipe` of a recipe file. Raises: ConfigError when there is no such file or function."""
    return _recipe(_loaded(path), path)


def _loaded(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the path of a recipe file")
    spec = importlib.util.spec_from_file_location(f"megabatch_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; give the path of a recipe file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _recipe(module: ModuleType, path: Path) -> Callable[[], Recipe]:
    found = getattr(module, "recipe", None)
    if not callable(found):
        raise ConfigError(f"{path} has no function `recipe` that returns a Recipe")
    return found
