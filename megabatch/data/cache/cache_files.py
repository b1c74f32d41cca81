"""The files of a token cache: written under a temporary name with digests, mapped and verified.

ids.bin      int32, all samples concatenated
weights.bin  float32, likewise
lengths.bin  int32, tokens of each sample
sums.bin     float64, sum of the weights of each sample
items.bin    int32, samples of each item, which stay together
origins.bin  int32, two for each sample: index of its file in meta.json's `sources`, line or row
column.*.bin, token_column.*.bin
             float32 or int32, further values per sample or per token that a task needs
name.*.bin   int32, for each sample: its index in the list of that name in meta.json's `names`
meta.json    counts, sources, the largest id, a digest of the samples, and size, blake2b and type of the files above
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megabatch.data.rows.digests import Digests
from megabatch.data.tokens.chunk import ChunkArrays
from megabatch.errors import DataError

DTYPES: dict[str, Any] = {
    "ids": np.int32,
    "weights": np.float32,
    "lengths": np.int32,
    "sums": np.float64,
    "items": np.int32,
    "origins": np.int32,
}
_DROPPED = "dropped: "
"""Begins remarks about rows that are left out."""
COLUMN, TOKEN_COLUMN, NAME = "column.", "token_column.", "name."
"""Prefixes of the names of further arrays."""
_CONTENT = ("ids", "weights", "lengths", "items")
"""The arrays that affect training, besides further columns."""


def write(path: Path, chunks: Iterable[ChunkArrays], *, digests: Digests | None = None) -> None:
    """Writes these chunks as a cache folder `path`, all or nothing; keeps a cache that appears there meanwhile.

    Args: `digests`: receives the digests of the files.
    Raises: DataError when there is no sample; OSError from the disk; whatever `chunks` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        meta = _write_columns(temporary, chunks)
        with open(temporary / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes a private folder; a cache is shared
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            # Another job made the same cache at the same time, and its ranks may have mapped it: keep that one.
            return
        if digests is not None:
            for name in meta["files"]:
                digests.note(_file(path, name), bytes.fromhex(meta["files"][name]["blake2b"]))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a cache; its name disappears in one step, before the files are deleted."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    path.rename(aside / "removed")
    shutil.rmtree(aside, ignore_errors=True)


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json. Raises: OSError, ValueError."""
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    return meta


def column(path: Path, name: str, expected: dict[str, Any], *, digests: Digests | None) -> np.ndarray:
    """Memory-maps one array.

    Raises: OSError; ValueError when its size or, with `digests`, its content differs; DataError.
    """
    file = _file(path, name)
    size = file.stat().st_size
    if size != expected["size"]:
        raise ValueError(f"{file.name} has {size} bytes instead of {expected['size']}")
    if digests is not None and digests.content(file).hex() != expected["blake2b"]:
        raise ValueError(f"the digest of {file.name} differs")
    return np.memmap(file, np.dtype(expected["dtype"]), mode="r").reshape(-1, *expected["shape"])


def _file(path: Path, name: str) -> Path:
    return path / f"{name}.bin"


class _Column:
    """An array file being written; tracks its size and digest."""

    def __init__(self, folder: Path, name: str, *, dtype: Any, shape: tuple[int, ...] = ()) -> None:
        """Args: `shape`: that of one sample's, item's or token's value."""
        self._dtype, self._shape = np.dtype(dtype), shape
        self._file = open(_file(folder, name), "wb")  # noqa: SIM115 - closed by `close`
        self._size = 0
        self._content = hashlib.blake2b()

    def append(self, values: Any) -> None:
        data = np.ascontiguousarray(values, self._dtype).tobytes()
        self._file.write(data)
        self._size += len(data)
        self._content.update(data)

    @property
    def content(self) -> bytes:
        """Digest of the values appended so far."""
        return self._content.digest()

    def close(self, *, sync: bool) -> dict[str, Any]:
        with self._file:
            if sync:
                self._file.flush()
                os.fsync(self._file.fileno())
        form = {"dtype": self._dtype.name, "shape": list(self._shape)}
        return {"size": self._size, "blake2b": self._content.hexdigest(), **form}


def _write_columns(folder: Path, chunks: Iterable[ChunkArrays]) -> dict[str, Any]:
    """Writes the arrays and returns the metadata."""
    columns = {name: _Column(folder, name, dtype=dtype) for name, dtype in DTYPES.items()}
    sources: dict[tuple[str, bool], int] = {}
    dropped: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    first: dict[str, str] = {}
    names: dict[str, dict[str, int]] = {}
    max_id = samples = 0
    try:
        for chunk in chunks:
            dropped.update(chunk.dropped)
            remarks.update(chunk.remarks)
            first = {**chunk.first, **first}
            if not len(chunk.lengths):
                continue
            further = _further(chunk, names)
            if not samples:
                columns |= {
                    name: _Column(folder, name, dtype=values.dtype, shape=values.shape[1:])
                    for name, values in further.items()
                }
            assert len(columns) == len(DTYPES) + len(further), "all samples of a dataset have the same columns"
            samples += len(chunk.lengths)
            max_id = max(max_id, int(chunk.ids.max()))
            numbers = np.array([sources.setdefault(file, len(sources)) for file in chunk.files], np.int32)
            for name in ("ids", "weights", "lengths", "sums", "items"):
                columns[name].append(getattr(chunk, name))
            columns["origins"].append(np.stack([numbers[chunk.origins[:, 0]], chunk.origins[:, 1]], axis=1))
            for name, values in further.items():
                columns[name].append(values)
        if not samples:
            equal = Counter({remark: count for remark, count in remarks.items() if remark.startswith(_DROPPED)})
            raise DataError(_nothing_left(dropped + equal, first))
    finally:
        written = {name: column.close(sync=bool(samples)) for name, column in columns.items()}
    return {
        "samples": samples,
        "max_id": max_id,
        "content": _digest(columns[name].content for name in (*_CONTENT, *_learned(columns))),
        "dropped": dict(dropped),
        "remarks": dict(+remarks),
        "first": first,
        "sources": [list(source) for source in sources],
        "names": {column: list(found) for column, found in names.items()},
        "files": written,
    }


def _further(chunk: ChunkArrays, names: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
    """The task's further columns by file name; extends `names`, which number the names over all chunks."""
    found = {COLUMN + name: values for name, values in chunk.columns.items()}
    found |= {TOKEN_COLUMN + name: values for name, values in chunk.token_columns.items()}
    for column, own in chunk.names.items():
        known = names.setdefault(column, {})
        for name in own.names:
            known.setdefault(name, len(known))
        found[NAME + column] = own.among(list(known)).numbers
    return found


def _learned(columns: Iterable[str]) -> list[str]:
    """Further columns that may affect training; names only decide under which metric a sample counts."""
    return sorted(name for name in columns if name not in DTYPES and not name.startswith(NAME))


def _nothing_left(counted: Counter[str], first: Mapping[str, str]) -> str:
    """Why no sample is left: how many rows were dropped for each reason, and the first of each."""
    reasons = [
        f"{count} rows {reason.removeprefix(_DROPPED)}{f' (the first is {first[reason]})' if reason in first else ''}"
        for reason, count in counted.items()
        if count
    ]
    said = "; ".join(reasons) or "it has no rows"
    return f"no sample of the dataset is left: {said}; check the data and data.max_length"


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
