"""Files of a user's own that a recipe names as `file.py:name`: callbacks, rewards, schedulers of turns.

The launcher loads them to refuse a broken one before the job is queued, and copies them with the code that the job
runs; the ranks, and the processes that they start, load the copies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from megabatch.errors import ConfigError, MegabatchError
from megabatch.own_code import PACKAGE
from megabatch.user_error import NO_EXIT, describe_error


def split(text: str, *, kind: str = "class", example: str = "callbacks.py:Report") -> tuple[Path, str]:
    """File and name of `file.py:name`. Raises: ConfigError for other texts, calling the name a `kind`."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"must be a Python file and a {kind} in it, such as {example}")
    return Path(file), name


def names_own_code(text: str) -> bool:
    """Whether a text is meant as `file.py:name` rather than as the name of something that megabatch ships."""
    return ".py:" in text or text.endswith(".py") or "/" in text


def archived(file: Path) -> str:
    """Path of such a file inside the job's snapshot; recipes name the file by its absolute path."""
    return f"recipe/own/{hashlib.sha256(str(file).encode()).hexdigest()[:16]}/{file.name}"


def files_to_archive(named: Sequence[str]) -> dict[str, Path]:
    """The files of these texts by their names in a snapshot; `load` refuses those that are missing."""
    files = (Path(text.rpartition(":")[0]).expanduser().absolute() for text in named)
    return {archived(file): file for file in files if file.is_file()}


def location(text: str) -> Path:
    """The file of `file.py:name` that this process runs: in a snapshot, the snapshot's copy."""
    file = split(text)[0].expanduser().absolute()
    copy = PACKAGE.parent / archived(file)
    return copy if copy.is_file() else file


def load_named(text: str, *, kind: str = "class", example: str = "callbacks.py:Report") -> tuple[Any, Path]:
    """What `file.py:name` names, and the file that it is from; from a snapshot, the snapshot's copy of the file.

    Raises: ConfigError with the line for a file that cannot be run, or one without that name.
    """
    name = split(text, kind=kind, example=example)[1]
    file = location(text)
    module = _module(file)
    found = getattr(module, name, None)
    if not callable(found) or (kind == "class" and not isinstance(found, type)):
        alike = (key for key, value in vars(module).items() if _is_a(kind, value, module))
        raise ConfigError(f"{file} has no {kind} {name}{near(name, alike)}")
    return found, file


def _is_a(kind: str, value: object, module: ModuleType) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return isinstance(value, type) if kind == "class" else callable(value) and own


def _module(file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; check the path")
    return module_of(file, name=f"megabatch_user_{file.stem}")


def module_of(file: Path, *, name: str) -> ModuleType:
    """The module that a file makes, under this name.

    Raises: ConfigError with the line of what stops it, and where it goes to another folder.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file; its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with in_one_folder(file):
            spec.loader.exec_module(module)
    except SyntaxError as error:
        place = f"{error.filename}:{error.lineno}" if error.lineno else f"{file}"
        raise ConfigError(f"{place}: {error.msg}") from error
    except SystemExit as error:
        raise ConfigError(f"{describe_error(error, file)}{NO_EXIT}") from error
    except MegabatchError:
        raise
    except Exception as error:
        raise ConfigError(describe_error(error, file)) from error
    return module


@contextmanager
def in_one_folder(file: Path) -> Iterator[None]:
    """Raises: ConfigError where the file's code goes to another folder: relative paths on the command line would mean
    others."""
    before = _folder()
    yield
    if before is not None and (now := os.getcwd()) != before:
        os.chdir(before)
        raise moved(file, now)


def _folder() -> str | None:
    """The current folder, None if it was removed: a rank's may be."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def moved(file: Path, now: str) -> ConfigError:
    """The error for a file whose code went to the folder `now`."""
    return ConfigError(
        f"{file.name} changes the current folder to {now}, so that relative paths would mean others than where the "
        "command was started; leave os.chdir out, and write paths beside the file as "
        "Path(__file__).parent / NAME, as text"
    )


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""
