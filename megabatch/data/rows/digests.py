"""Digests of files, cached: a file is read again only if its size, times or inode differ.

`.digests.json` in the cache folder holds size, mtime_ns, ctime_ns, inode and digest for each path. No program can set
ctime, so an edit whose size and mtime were put back is found too.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from megabatch.converters.atomic import replacing
from megabatch.data.rows import files

NAME = ".digests.json"
_SETTLED_S = 2
"""A file that changed more recently may change again within the same tick of its file system's clock."""


class Digests:
    """The digests that one attempt of a run computes; `save` keeps them for the next."""

    def __init__(self, folder: Path) -> None:
        self._path = Path(folder) / NAME
        self._known = _read(self._path)
        self._new: dict[str, list[Any]] = {}

    def content(self, path: Path) -> bytes:
        """blake2b digest of a file's bytes. Raises: DataError when it cannot be read."""
        name = str(Path(path).resolve())
        with contextlib.suppress(OSError):
            known = self._new.get(name) or self._known.get(name)
            if known and known[:-1] == _state(path):
                return bytes.fromhex(known[-1])
        before = _state_or_none(path)
        digest = files.content_digest(path)
        if before is not None and before == _state_or_none(path) and _is_settled(before):
            self._new[name] = [*before, digest.hex()]
        return digest

    def note(self, path: Path, digest: bytes) -> None:
        """Remembers the digest of a file that was just written and that nobody else has open."""
        if state := _state_or_none(path):
            self._new[str(Path(path).resolve())] = [*state, digest.hex()]

    def save(self) -> None:
        """Adds new digests to the file if the folder is writable; otherwise later attempts read the files again."""
        if not self._new:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            merged = {name: kept for name, kept in _read(self._path).items() if Path(name).exists()} | self._new
            with replacing(self._path) as file:
                file.write(json.dumps(merged).encode())
            self._known, self._new = merged, {}


def _read(path: Path) -> dict[str, list[Any]]:
    """The saved digests; none if the file is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
        return {name: known for name, known in found.items() if _is_entry(known)}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_entry(known: Any) -> bool:
    return isinstance(known, list) and len(known) == 5 and isinstance(known[-1], str) and len(known[-1]) == 128


def _state(path: Path) -> list[Any]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _state_or_none(path: Path) -> list[Any] | None:
    try:
        return _state(path)
    except OSError:
        return None


def _is_settled(state: list[Any]) -> bool:
    return time.time_ns() - max(state[1], state[2]) > _SETTLED_S * 10**9
