"""Loads a recipe file, builds what it declares, and explains failures."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from megabatch.chain.declare import Chain
from megabatch.config.recipe import Recipe
from megabatch.config.unknown_field import unknown_field
from megabatch.errors import ConfigError, MegabatchError
from megabatch.sweep.declare import Sweep
from megabatch.user_code import in_one_folder, module_of, moved
from megabatch.user_error import NO_EXIT, describe_error, place_in


def loaded(path: Path) -> ModuleType:
    """The module of a recipe file. Raises: ConfigError when it is not a Python file, or cannot be imported."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the path of a recipe file in it")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the path of a recipe file")
    folder = str(path.parent.absolute())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a program: the file may import its neighbours
    return module_of(path, name=f"megabatch_recipe_{path.stem}")


def require_start_folder(file: Path) -> None:
    """Of the program's own file: that it did not go to another folder before its `main`. Raises: ConfigError."""
    own, named = getattr(sys.modules["__main__"], "__file__", None), Path(sys.argv[0])
    if own is None or not Path(own).is_absolute() or Path(own).name != named.name:
        return
    if named.is_absolute():
        went = Path(own) == file and _goes_elsewhere(file)
    else:
        went = Path(os.path.normpath(named.absolute())) != Path(os.path.normpath(own))
    if went:
        raise moved(file, os.getcwd())


def _goes_elsewhere(file: Path) -> bool:
    """Whether a file's top level calls `chdir`, and the shell was in another folder. Only both together tell: an
    absolute path says nothing of where the command was started, and a shell's PWD is stale where a program started
    the command in a folder of its choice."""
    shell, text = os.environ.get("PWD", ""), file.read_text(encoding="utf-8", errors="replace")
    if "chdir" not in text or not os.path.isdir(shell) or os.path.samefile(shell, os.getcwd()):
        return False
    import ast

    outside = [one for one in ast.parse(text).body if not isinstance(one, ast.FunctionDef | ast.ClassDef)]
    calls = (node.func for one in outside for node in ast.walk(one) if isinstance(node, ast.Call))
    return any(getattr(call, "attr", getattr(call, "id", None)) == "chdir" for call in calls)


def file_of(recipe: Callable[[], Recipe | Chain]) -> Path:
    """The file that defines a recipe's function. Raises: ConfigError for anything but such a function."""
    code = getattr(recipe, "__code__", None)
    if code is None:
        what = f"a {type(recipe).__name__}" if isinstance(recipe, Recipe | Chain) else repr(recipe)
        raise ConfigError(f"main() was given {what}; it takes the function that builds one: main(recipe)")
    return Path(code.co_filename)


def as_declared(recipe: Callable[[], Recipe | Chain], file: Path) -> Recipe | Chain:
    """The recipe or chain as its file builds it.

    Raises: ConfigError with the file's line for an unknown field and for any other exception of the file.
    """
    if needed := _needed(recipe):
        raise ConfigError(f"{file.name}: recipe() is called without arguments, but needs {needed}; give defaults")
    try:
        with in_one_folder(file):
            built = recipe()
    except MegabatchError:
        raise
    except SystemExit as error:
        raise ConfigError(f"{describe_error(error, file)}{NO_EXIT}") from error
    except Exception as error:
        fault = unknown_field(error) if isinstance(error, TypeError) else None
        if fault is None:
            raise ConfigError(describe_error(error, file)) from error
        raise ConfigError([replace(fault, field=f"{place_in(error, file)}: {fault.field}")]) from error
    if not isinstance(built, Recipe | Chain):
        raise ConfigError(f"{file.name}: recipe() returns {built!r}; it must return a Recipe or a Chain")
    return built


def _needed(recipe: Callable[[], Recipe | Chain]) -> str:
    """The arguments of a recipe's function that have no default, with commas between them."""
    code = getattr(recipe, "__code__", None)
    if code is None or inspect.ismethod(recipe):
        return ""
    needed = code.co_argcount - len(getattr(recipe, "__defaults__", None) or ())
    return ", ".join(code.co_varnames[:needed])


def load_declared(path: Path) -> Callable[[], Recipe] | Sweep:
    """The sweep that a recipe file declares, or else its function `recipe`.

    Raises: ConfigError when the file is missing, has neither, or has more than one sweep.
    """
    names = vars(module := loaded(path))
    sweeps = [name for name, value in names.items() if isinstance(value, Sweep)]
    if len(sweeps) > 1:
        raise ConfigError(f"{path} declares {len(sweeps)} sweeps ({', '.join(sweeps)}); run the file itself")
    return names[sweeps[0]] if sweeps else _recipe(module, path)


def load_recipe(path: Path) -> Callable[[], Recipe]:
    """The function `recipe` of a recipe file. Raises: ConfigError when there is no such file or function."""
    return _recipe(loaded(path), path)


def _recipe(module: ModuleType, path: Path) -> Callable[[], Recipe]:
    found = getattr(module, "recipe", None)
    if not callable(found):
        raise ConfigError(f"{path} has no function `recipe` that returns a Recipe")
    return found
