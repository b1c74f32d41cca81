"""A copy of the code that a job runs, named by its content: editing files while a job waits changes nothing for it.

It is one archive, `<SHA-256>.tar`, so that a node can check all of it at once before running it: each node unpacks
it into a folder that only this user can access (`megabatch.slurm.script.code`). It holds only sources: bytecode
differs between compilations, and a dry run would have to compile to know the archive's name.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.own_code import PACKAGE
from megabatch.run_directory import write_bytes_atomic
from megabatch.values import dataclass

_LEFT_OUT = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
_BLOCK = 512
_NAME_BYTES = 100
"""Limit on names in a ustar header."""
_MODE_AND_OWNER = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"%011o\0" % 0
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_SUM = sum(_MODE_AND_OWNER + _TIME + _REST) + 8 * ord(" ")
"""What every header adds to its checksum, whose own eight bytes count as spaces."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The code at the time it was read."""

    path: Path
    """Path of the archive: `<SHA-256 of its bytes>.tar`."""
    content: bytes = field(repr=False)
    """A tar archive of `megabatch/` and, with a recipe, `recipe/<its file>`; only plain files."""

    def store(self) -> None:
        """Writes the archive unless this user's identical one exists; replaces anything else of that name.

        Raises: LaunchError when it cannot be written.
        """
        try:
            if not self._is_there():
                self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                write_bytes_atomic(self.path, self.content)
        except OSError as error:
            raise LaunchError(
                f"cannot store the code snapshot in {self.path.parent}: {error}; free space there or choose another"
            ) from error

    def _is_there(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
            return own and found.st_size == len(self.content) and file.read() == self.content


def snapshot_of(
    store: Path, *, recipe: Path | None = None, further: Mapping[str, Path] | None = None, package: Path | None = None
) -> Snapshot:
    """Reads the current code; writes nothing.

    Args: `store` is a folder on shared storage; `further`: files by their names in the archive; `package` is the
    installed one unless given. Links are resolved.
    Raises: LaunchError when a file cannot be read.
    """
    try:
        contents = {name: _read(path) for name, path in (_files(recipe, package) | dict(further or {})).items()}
    except OSError as error:
        raise LaunchError(f"cannot read the code for the job: {error}") from error
    content = _archive(contents)
    return Snapshot(store / f"{hashlib.sha256(content).hexdigest()}.tar", content)


def read_snapshot(path: Path) -> dict[str, bytes]:
    """The files of a stored archive by name. Raises: OSError when it cannot be read, or is damaged."""
    import tarfile

    try:
        with tarfile.open(path, "r:") as archive:
            return {one.name: file.read() for one in archive if (file := archive.extractfile(one)) is not None}
    except tarfile.TarError as error:
        raise OSError(f"{path}: {error}") from error


def _read(path: str | Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _files(recipe: Path | None, package: Path | None) -> dict[str, str | Path]:
    files: dict[str, str | Path] = dict(_package_files(package or PACKAGE))
    if recipe is not None:
        files[f"recipe/{recipe.name}"] = recipe
    return files


def _package_files(package: Path) -> Iterator[tuple[str, str]]:
    """Relative name and path of each file, in sorted order; follows links to folders."""
    root = os.fspath(package)
    for folder, subfolders, names in os.walk(root, followlinks=True):
        within = f"megabatch{folder.removeprefix(root)}"
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT)
        for name in sorted(names):
            if not name.endswith((".pyc", ".tmp")):
                yield f"{within}/{name}", f"{folder}/{name}"


def _archive(contents: dict[str, bytes]) -> bytes:
    """A deterministic archive: the same files give the same bytes, for any user at any time."""
    parts: list[bytes] = []
    for name, content in sorted(contents.items()):
        parts += [_header(os.fsencode(name), len(content)), content, bytes(-len(content) % _BLOCK)]
    return b"".join([*parts, bytes(2 * _BLOCK)])


def _header(name: bytes, size: int) -> bytes:
    """The header of a plain file, readable for all, without owner and time."""
    if len(name) > _NAME_BYTES:
        import tarfile  # importing it takes as long as running all the rest

        long = tarfile.TarInfo(os.fsdecode(name))
        long.size = size
        return long.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")
    length = b"%011o\0" % size
    checksum = _SUM + sum(name) + sum(length)
    return name.ljust(_NAME_BYTES, b"\0") + _MODE_AND_OWNER + length + _TIME + b"%06o\0 " % checksum + _REST
