"""Dataset strings → rows with their origin.

`names` says what a dataset string may be. A path is a JSONL, JSON, CSV, TSV, Parquet or plain-text file, or a folder
of such files; the text ones may be compressed. `#count` takes that many rows of this dataset: a seeded random subset
(the first rows when the dataset is not shuffled); above the dataset's size, whole repetitions and a subset. For an
example dataset, it generates that many rows.

Local files are streamed, so memory does not grow with the dataset; only a JSON list is read as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megabatch.data.rows import files, hub, names, synthetic
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.files import Line, Row
from megabatch.errors import DataError
from megabatch.values import dataclass

Hub = Literal["hf", "ms"]


@dataclass(frozen=True, slots=True)
class Source:
    """A resolved dataset string: where its rows are and how many to take."""

    text: str
    """As the user wrote it."""
    paths: tuple[Path, ...] = ()
    """Local files in reading order; empty for a hub dataset."""
    hub: Hub | None = None
    name: str = ""
    """Hub name, `org/name[:subset[:split]]`."""
    example: str | None = None
    """Name of a generated dataset, see `synthetic`."""
    count: int | None = None

    def rows(self, *, seed: int, shuffle: bool) -> Iterator[Row]:
        """All wanted rows, in the dataset's own order (the schedule shuffles). Raises DataError when empty."""
        return map(files.parsed, self.unparsed(seed=seed, shuffle=shuffle))

    def unparsed(self, *, seed: int, shuffle: bool) -> Iterator[Row | Line]:
        """The same rows, unparsed; pass each to `files.parsed`."""
        total = 0
        if self.count is None or self.example:
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

    def fingerprint(self, digests: Digests) -> str:
        """Digest of the content that the rows come from; file names matter only by their order and suffixes."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            digest.update("".join(path.suffixes[-2:]).encode())
            digest.update(digests.content(path))
        if self.hub:
            digest.update(hub.fingerprint(self.hub, self.name).encode())
        if self.example:
            digest.update(f"example:{self.example}:{synthetic.VERSION}".encode())
        digest.update(repr(self.count).encode())
        return digest.hexdigest()

    def _all(self) -> Iterator[Row | Line]:
        if self.example:
            yield from synthetic.rows(self.example, self.count)
        if self.hub:
            yield from hub.rows(self.hub, self.name)
        for path in self.paths:
            yield from files.unparsed(path)


def resolve(datasets: Sequence[str], *, use_hf: bool = True) -> list[Source]:
    """Sources of all dataset strings, in order.

    Args: `use_hf`: which hub a name without `hf::` or `ms::` means (Hugging Face, else ModelScope).
    Raises: DataError when a path does not exist, with the nearest names, or a folder holds no readable file.
    """
    return [_resolve(text, use_hf=use_hf) for text in datasets]


def repetitions(total: int, count: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """How often to take each of `total` rows to get `count` rows: int64 [total]."""
    if not total:
        return np.zeros(0, np.int64)
    whole, rest = divmod(count, total)
    times: np.ndarray = np.full(total, whole, np.int64)
    chosen = np.random.default_rng([seed, total]).permutation(total)[:rest] if shuffle else np.arange(rest)
    times[chosen] += 1
    return times


def _resolve(text: str, *, use_hf: bool) -> Source:
    name = names.parse(text, use_hf=use_hf)
    if name.kind == "example":
        return Source(text, example=name.where, count=name.count)
    if name.kind == "path":
        return Source(text, paths=tuple(names.local_files(name)), count=name.count)
    return Source(text, hub=name.kind, name=name.where, count=name.count)
