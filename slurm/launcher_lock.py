"""One launcher at a time in a run directory, so that two terminals cannot submit the same run together."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory

_BUSY = (BlockingIOError, PermissionError)
"""What flock and lockf raise for a lock that another process holds."""


class LockedError(LaunchError):
    """Another launcher is working in the run directory."""


@contextmanager
def launcher_lock(run: RunDirectory) -> Iterator[None]:
    """Locks an existing run directory for this process; the system releases the lock when the process ends.

    On a file system without locks, nothing is locked.
    Raises: LockedError, at once, when another launcher holds it or has just removed it; OSError when nothing can be
    written there.
    """
    with open(run.launcher_lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except _BUSY as error:
            raise already_locked(run) from error
        except OSError:
            pass
        if not _is_there(run.launcher_lock, file.fileno()):
            raise already_locked(run)
        try:
            yield
        finally:
            with suppress(OSError):
                run.launcher_lock.unlink()


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file: the previous holder may have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def already_locked(run: RunDirectory) -> LockedError:
    """The error for a launcher that came second."""
    return LockedError(f"{run.path}: another launcher is using it; see megabatch status, or use --run_dir")
