"""Writes files atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, cast

from xxhash import xxh3_64

from megabatch.saved.manifest import WHOLE, File, Range

_NOTED: ContextVar[dict[Path, File] | None] = ContextVar("noted", default=None)


@contextmanager
def noting() -> Iterator[dict[Path, File]]:
    """Records by path the files that `replacing` writes in this thread inside the block, with their digests."""
    noted: dict[Path, File] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


class _Digested:
    """A file that is written from its beginning to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest, self._size = xxh3_64(), 0

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    def noted(self) -> File:
        return File(self._size, (Range(WHOLE, 0, self._size, self._digest.hexdigest()),))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path`, synced, when the block ends; removes it when the block fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        noted = _NOTED.get()
        with open(temporary, "wb") as file:
            digested = _Digested(file)
            yield file if noted is None else cast(BinaryIO, digested)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if noted is not None:
            noted[path] = digested.noted()
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that new names in it survive a crash."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
