"""Who owns, and who can write, the files that a job runs: what tells a job what to run must be its user's own,
wherever others may write beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megabatch.errors import LaunchError


def read_own(path: Path) -> bytes:
    """The content of a plain file that this user owns and nobody else can write; we check the open file that we read.

    Raises: LaunchError, naming the file, for any other; FileNotFoundError or another OSError if it cannot be read.
    """
    if path.is_symlink():
        raise LaunchError(f"{path} is a link; what a job runs must be a regular file: {_FIX}")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise LaunchError(f"{path} is not a regular file; remove it")
        if found.st_uid != os.getuid():
            raise LaunchError(f"{path} belongs to {_user(found.st_uid)}, who can change what your job runs: {_FIX}")
        if is_others_to_write(found):
            raise LaunchError(f"{path} can be written by others: check its content, then run: chmod go-w {path}")
        return file.read()


def require_own(*paths: Path) -> None:
    """Raises: LaunchError for an existing path if it, or its link's target, belongs to another user."""
    for path in paths:
        for look in (os.lstat, os.stat):
            try:
                found = look(path)
            except OSError:
                continue
            if found.st_uid != os.getuid():
                raise LaunchError(
                    f"{path} belongs to {_user(found.st_uid)}, who can change what your job runs: {_FIX}"
                )


def is_others_to_write(found: os.stat_result) -> bool:
    """Whether anyone but the owner can write it; the owner's private group, as on many systems, does not count."""
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_private(found.st_gid, found.st_uid)


_FIX = "submit its recipe to a folder of your own"


def _is_private(group: int, owner: int) -> bool:
    import grp
    import pwd

    try:
        name, found = pwd.getpwuid(owner).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == name and not set(found.gr_mem) - {name}


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
