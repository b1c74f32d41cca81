"""Callbacks: classes of a user's own file that the trainer tells of steps, evaluations and checkpoints.

The launcher loads them to refuse a broken one before the job is queued; the trainer loads them to call them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megabatch.errors import ConfigError
from megabatch.own_code import PACKAGE
from megabatch.user_error import describe_error

HOOKS: Mapping[str, Mapping[str, Any]] = {
    "on_step": {"step": 1, "metrics": {}},
    "on_evaluate": {"step": 1, "metrics": {}},
    "on_save": {"step": 1, "path": ""},
    "on_end": {"step": 1, "outcome": ""},
}
"""The methods that a callback class may define, and their arguments."""


def split(text: str) -> tuple[Path, str]:
    """File and class of `file.py:Class`. Raises: ConfigError for other texts."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError("must be a Python file and a class in it, such as callbacks.py:Report")
    return Path(file), name


def archived(file: Path) -> str:
    """Path of a callback's file inside the job's snapshot; recipes name the file by its absolute path."""
    return f"recipe/callbacks/{hashlib.sha256(str(file).encode()).hexdigest()[:16]}/{file.name}"


def files_to_archive(callbacks: Sequence[str]) -> dict[str, Path]:
    """The files of these callbacks by their names in a snapshot; `load` refuses those that are missing."""
    files = (Path(text.rpartition(":")[0]).expanduser().absolute() for text in callbacks)
    return {archived(file): file for file in files if file.is_file()}


def load(text: str) -> Any:
    """A new instance of a callback's class; code that runs from a snapshot loads the snapshot's copy of the file.

    Raises: ConfigError with the line for a file that cannot be run, and for a class that cannot be used.
    """
    file, name = split(text)
    file = file.expanduser().absolute()
    copy = PACKAGE.parent / archived(file)
    module = _module(copy if copy.is_file() else file)
    made = getattr(module, name, None)
    if not isinstance(made, type):
        near = _near(name, (key for key, value in vars(module).items() if isinstance(value, type)))
        raise ConfigError(f"{file} has no class {name}{near}")
    try:
        found = made()
    except Exception as error:
        raise ConfigError(f"{name}() cannot be made: {describe_error(error, file)}") from error
    _check_hooks(found, name)
    return found


def _module(file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; check the path")
    spec = importlib.util.spec_from_file_location(f"megabatch_callback_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "its name ends with .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise ConfigError(describe_error(error, file)) from error
    return module


def _check_hooks(callback: Any, name: str) -> None:
    own = [attribute for attribute in dir(callback) if attribute.startswith("on_")]
    if not own:
        raise ConfigError(f"{name} has none of the methods {', '.join(HOOKS)}")
    for hook in own:
        if hook not in HOOKS:
            raise ConfigError(f"{name}.{hook} is never called{_near(hook, HOOKS)}")
        given = HOOKS[hook]
        try:
            inspect.signature(getattr(callback, hook)).bind(**given)
        except TypeError as error:
            raise ConfigError(f"{name}.{hook} must take the keywords {', '.join(given)} ({error})") from error


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
