"""One number for each sample of a token cache, stored once beside it: written by the first run that computes them.

A file holds a digest, then float32 values. The first writer wins: a run that another one overtook reads what is there,
so that both, and whoever resumes either, train on the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import numpy as np

from megabatch.errors import DataError

log = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_DTYPE: np.dtype[np.float32] = np.dtype("<f4")


def write(path: Path, values: np.ndarray) -> None:
    """Stores the values unless the file is there. Raises: DataError for a disk that cannot hold them."""
    data = np.ascontiguousarray(values, _DTYPE).tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(_digest(data) + data)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
        finally:
            os.unlink(name)
    except OSError as e:
        raise DataError(
            f"{path}: cannot be written ({e.strerror or e}); free space there or choose another cache folder"
        ) from e


def read(path: Path, *, count: int) -> np.ndarray | None:
    """The values, float32 [count]; None if there are none, or damaged ones, which are removed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    digest, values = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if digest == _digest(values) and len(values) == count * _DTYPE.itemsize:
        return np.frombuffer(values, _DTYPE)
    log.warning("%s is damaged, and is computed again", path)
    path.unlink(missing_ok=True)
    return None


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
