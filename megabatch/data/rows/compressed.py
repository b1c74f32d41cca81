"""Reads dataset files as bytes, compressed or not, without decompressing to disk.

gzip is Python's own. Zstandard is read by pyarrow, which comes with `datasets`; Python 3.11 to 3.13 have none.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import IO, cast

from megabatch.errors import DataError

COMPRESSIONS = (".gz", ".zst")

_BUFFER = 1 << 16


def inner_suffix(path: Path) -> str:
    """Suffix of what is inside, in lower case: `.jsonl` of `a.jsonl.gz`."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, uncompressed while it is read. Raises: OSError, DataError without a reader for it."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return cast(IO[bytes], gzip.open(path, "rb"))
    return _zstandard(path) if suffix == ".zst" else open(path, "rb")


def is_damage(error: BaseException) -> bool:
    """Whether reading failed because the compressed data is damaged, not because of the disk or permissions."""
    return isinstance(error, EOFError | zlib.error) or (isinstance(error, OSError) and error.errno is None)


def _zstandard(path: Path) -> IO[bytes]:
    try:
        import pyarrow as pa
    except ImportError as e:
        raise DataError(f"{path}: reading .zst needs pyarrow; pip install pyarrow, or give the file as .gz") from e
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), _BUFFER)
