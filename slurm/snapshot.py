"""A copy of the code that a job runs, named by its content: editing files while a job waits changes nothing for it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import megabatch
from megabatch.errors import LaunchError

_LEFT_OUT = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


def take_snapshot(store: Path, *, recipe: Path | None = None, package: Path | None = None) -> Path:
    """The folder to put on PYTHONPATH, holding `megabatch/` and, with `recipe`, `recipe/<its file>`.

    Args: `store` is a folder on shared storage; `package` is the installed one unless given. Links are resolved: the
    snapshot holds plain files. Unchanged code gives the same folder again.
    Raises: LaunchError when the store cannot be written.
    """
    try:
        contents = {name: path.read_bytes() for name, path in _files(recipe, package).items()}
        final = store / _digest(contents)
        if not final.is_dir():
            _publish(contents, final)
    except OSError as error:
        raise LaunchError(
            f"cannot store the code snapshot in {store}: {error}; free space there or choose another"
        ) from error
    return final


def snapshot_path(store: Path, *, recipe: Path | None = None, package: Path | None = None) -> Path:
    """Where `take_snapshot` would put the code as it is now; nothing is written."""
    return store / _digest({name: path.read_bytes() for name, path in _files(recipe, package).items()})


def _files(recipe: Path | None, package: Path | None) -> dict[str, Path]:
    files = dict(_package_files(package or Path(megabatch.__path__[0])))
    if recipe is not None:
        files[f"recipe/{recipe.name}"] = recipe
    return files


def _package_files(package: Path) -> Iterator[tuple[str, Path]]:
    """Relative name and path of each file, in sorted order; folders that are links are walked like others."""
    for folder, subfolders, names in os.walk(package, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT)
        for name in sorted(names):
            if not name.endswith((".pyc", ".tmp")):
                path = Path(folder, name)
                yield f"megabatch/{path.relative_to(package).as_posix()}", path


def _digest(contents: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, content in sorted(contents.items()):
        whole.update(f"{name}\0".encode(errors="surrogateescape"))
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()[:16]


def _publish(contents: dict[str, bytes], final: Path) -> None:
    """Writes under a temporary name and renames; who comes second finds the first one's folder."""
    final.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        staged.chmod(0o755)
        for folder in dict.fromkeys((staged / name).parent for name in contents):
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (staged / name).write_bytes(content)
        try:
            staged.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
