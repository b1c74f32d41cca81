"""Dataset strings → rows that know where they came from.

A dataset string is `path[#count]` or `[hf::|ms::]org/name[:subset[:split]][#count]`. A path is a JSONL, JSON, CSV,
Parquet or plain-text file, or a folder of such files. `#count` takes that many rows of this dataset: a seeded random
subset (the first rows when the dataset is not shuffled); above the dataset's size, whole repetitions and a subset.

Local files are streamed, so memory does not grow with the dataset; only a JSON list is read as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megabatch.errors import DataError
from megabatch.trainer.data import files, hub
from megabatch.trainer.data.files import Row

Hub = Literal["hf", "ms"]

_COUNT = re.compile(r"#(\d+)$")
_HUB_NAME = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(?::[\w./-]+){0,2}$")


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset string, resolved: where its rows are and how many of them are wanted."""

    text: str
    """As the user wrote it."""
    paths: tuple[Path, ...] = ()
    """Local files in reading order; empty for a hub dataset."""
    hub: Hub | None = None
    name: str = ""
    """Hub name, `org/name[:subset[:split]]`."""
    count: int | None = None

    def rows(self, *, seed: int, shuffle: bool) -> Iterator[Row]:
        """All wanted rows, in the dataset's own order (the schedule shuffles). Raises DataError when empty."""
        total = 0
        if self.count is None:
            for row in self._all():
                total += 1
                yield row
        else:
            total = sum(1 for _ in self._all())
            times = repetitions(total, self.count, seed=seed, shuffle=shuffle)
            for row, wanted in zip(self._all(), times, strict=True):
                for _ in range(int(wanted)):
                    yield row
        if not total:
            raise DataError(f"dataset {self.text!r} is empty: it has no rows; give a file with at least one example")

    def fingerprint(self) -> str:
        """Digest of the content that the rows come from; the file names count only through their order and suffix."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            digest.update(path.suffix.encode())
            digest.update(files.content_digest(path))
        if self.hub:
            digest.update(hub.fingerprint(self.hub, self.name).encode())
        digest.update(repr(self.count).encode())
        return digest.hexdigest()

    def _all(self) -> Iterator[Row]:
        if self.hub:
            yield from hub.rows(self.hub, self.name)
        for path in self.paths:
            yield from files.rows(path)


def resolve(datasets: Sequence[str], *, use_hf: bool = True) -> list[Source]:
    """Sources of all dataset strings, in order.

    Args: `use_hf`: which hub a name without `hf::` or `ms::` means (Hugging Face, else ModelScope).
    Raises: DataError when a path does not exist, with the nearest names, or a folder holds no readable file.
    """
    return [_resolve(text, use_hf=use_hf) for text in datasets]


def repetitions(total: int, count: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """How often each of `total` rows is taken so that `count` are in all: int64 [total]."""
    if not total:
        return np.zeros(0, np.int64)
    whole, rest = divmod(count, total)
    times: np.ndarray = np.full(total, whole, np.int64)
    chosen = np.random.default_rng([seed, total]).permutation(total)[:rest] if shuffle else np.arange(rest)
    times[chosen] += 1
    return times


def _resolve(text: str, *, use_hf: bool) -> Source:
    where, count = text, None
    if match := _COUNT.search(text):
        where, count = text[: match.start()], int(match.group(1))
        if not count:
            raise DataError(f"dataset {text!r} asks for #0 rows; drop the #0 or ask for at least one")
    for prefix in ("hf", "ms"):
        if where.startswith(f"{prefix}::"):
            return Source(text, hub=prefix, name=where[4:], count=count)
    path = Path(where).expanduser()
    if path.exists():
        return Source(text, paths=tuple(_files_in(path) if path.is_dir() else [_known(path)]), count=count)
    if _HUB_NAME.match(where) and path.suffix.lower() not in files.SUFFIXES:
        return Source(text, hub="hf" if use_hf else "ms", name=where, count=count)
    raise DataError(f"dataset {text!r} does not exist{files.nearest(path)}")


def _files_in(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in files.SUFFIXES)
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not found:
        raise DataError(f"dataset folder {folder} has no {_suffix_list()} file; check the path")
    return found


def _known(path: Path) -> Path:
    if path.suffix.lower() not in files.SUFFIXES:
        raise DataError(f"dataset {path} is not a {_suffix_list()} file; convert or rename it")
    return path


def _suffix_list() -> str:
    return ", ".join(files.SUFFIXES)
