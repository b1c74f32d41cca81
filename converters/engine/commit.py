"""The last step of a conversion: small files, the index, the manifest, and the final name."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megabatch.converters.atomic import replacing, sync_folder
from megabatch.converters.auxiliary_files import carry_over
from megabatch.converters.engine.journal import Staged
from megabatch.converters.engine.manifest import MANIFEST, manifest
from megabatch.converters.engine.plan import Plan
from megabatch.errors import ConversionError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def commit(plan: Plan, staged: Staged, hashes: Mapping[int, str], *, world: int) -> None:
    """Renames the output to its final name; if several of `world` ranks get here at once, one of them does it.

    `hashes`: digests of the tensors that were verified.
    Raises: ConversionError when ranks cannot wait for each other.
    """
    with _alone(staged, world):
        if world > 1 and staged.named():  # another rank did
            staged.remove()
            return
        _clear(plan, staged)
        if plan.auxiliary is not None:
            carry_over(plan.auxiliary.folder, staged.files, skip=plan.auxiliary.replaced)
            for name, data in plan.auxiliary.replaced.items():
                _write(staged.files / name, data)
        for file in plan.small:
            _write(staged.files / file.name, file.make())
        _write(staged.files / MANIFEST, manifest(plan, hashes, staged.files))
        for folder in {path.parent for path in staged.files.rglob("*")}:
            sync_folder(folder)
        staged.note()
        _name(staged)
        staged.remove()


def _clear(plan: Plan, staged: Staged) -> None:
    """Removes the leftovers of a killed commit: all of it gets written again, and partial files are never used."""
    kept = {staged.files / file.name for file in plan.files}
    for path in staged.files.rglob("*"):
        if path not in kept and not path.is_dir():
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)


def _name(staged: Staged) -> None:
    """Renames the files to the output; swaps an existing output atomically where the system can."""
    if not staged.output.exists():
        os.rename(staged.files, staged.output)
    elif staged.output.is_dir() and not any(staged.output.iterdir()):
        os.rename(staged.files, staged.output)  # replaces an empty folder
    elif not _exchanged(staged.files, staged.output):
        old = staged.folder / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(staged.output, old)
        os.rename(staged.files, staged.output)
    sync_folder(staged.output.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Swaps two names at once, where kernel and file system can (Linux; not NFS)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


@contextmanager
def _alone(staged: Staged, world: int) -> Iterator[None]:
    """Waits for the other ranks' commits; a killed rank holds no lock."""
    try:
        file = os.open(staged.journals / "commit", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:  # another rank has just committed
        yield
        return
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            if world > 1:
                raise ConversionError(
                    f"{staged.folder}: everything is written, but this file system has no locks by which ranks agree "
                    "who commits; run once more as one process with --resume"
                ) from error
        yield
    finally:
        os.close(file)
