"""Opens input files: only regular files, and for files that are read whole only up to a maximum size.

Reading a pipe would block, and a device has no end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megabatch.errors import ConversionError

CONFIG_BYTES = 64 << 20
"""Most bytes of a config: of a model, of an adapter, of a checkpoint's format."""
INDEX_BYTES = 1 << 30
"""Most bytes of what lists all tensors: an index, a manifest, a checkpoint's `.metadata`."""


def open_regular(path: str | os.PathLike[str], *, why: str = "") -> int:
    """A descriptor to read from. Raises: ConversionError, with `why` behind it, for what cannot be opened or is no
    regular file."""
    try:
        # without O_NONBLOCK, opening a pipe without a writer would already block
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}{why}") from error
    except ValueError as error:
        raise ConversionError(f"{os.fspath(path)!r}: is not a file name: {error}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        kind = _kind(os.fstat(file).st_mode)
        os.close(file)
        raise ConversionError(f"{path}: cannot be read: it is a {kind}, not a regular file{why}")
    return file


def read_regular(path: Path, *, most: int = CONFIG_BYTES, why: str = "") -> bytes:
    """A whole file. Raises: ConversionError, also when it has more than `most` bytes."""
    with open(open_regular(path, why=why), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ConversionError(f"{path}: has {size} bytes, but such a file may have at most {most}{why}")
        try:
            return file.read(most)
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read: {error.strerror}{why}") from error


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return next((name for test, name in kinds if test(mode)), "device")
