"""Samples of a few rows, on their way from a tokenising process to the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple

import numpy as np

from megabatch.data.rows.files import Origin
from megabatch.data.tokens.sample import Encoded, Item
from megabatch.values import dataclass


class Names(NamedTuple):
    """A column of names that many samples share."""

    names: Sequence[str]
    """Each name once."""
    numbers: np.ndarray
    """Index in `names` of each sample: int32 [samples]."""

    def among(self, names: Sequence[str]) -> Names:
        """The same column, re-indexed into a list that contains all of its names."""
        places = {name: number for number, name in enumerate(names)}
        moved: np.ndarray = np.array([places[name] for name in self.names], np.int32)
        return Names(names, moved[self.numbers])


def numbered(names: Sequence[str]) -> Names:
    """The name column of samples with these names."""
    places = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return Names(list(places), np.array([places[name] for name in names], np.int32))


@dataclass(frozen=True, slots=True)
class Chunk:
    """The samples of a few rows, and why other rows gave none."""

    samples: list[Encoded] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    """One per sample."""
    items: list[int] = field(default_factory=list)
    """Number of samples in each item; they stay together."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → number of rows."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Remark, such as a column that nothing reads → number of rows."""
    first: dict[str, Origin] = field(default_factory=dict)
    """Reason or remark → the first of its rows, where that is known."""

    def drop(self, reason: str, origin: Origin) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, origin)

    def add(self, item: Item, origin: Origin) -> None:
        self.samples.extend(item)
        self.origins.extend([origin] * len(item))
        self.items.append(len(item))

    def arrays(self) -> ChunkArrays:
        """The same as a few arrays, which are quick to send and to write."""
        files = {(o.file, o.is_line): 0 for o in self.origins}
        for number, file in enumerate(files):
            files[file] = number
        lengths: np.ndarray = np.array([len(sample.ids) for sample in self.samples], np.int32)
        weights = _joined((sample.weights for sample in self.samples), np.float32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return ChunkArrays(
            ids=_joined((sample.ids for sample in self.samples), np.int32),
            weights=weights,
            lengths=lengths,
            sums=np.add.reduceat(weights, starts, dtype=np.float64) if len(starts) else np.zeros(0),
            items=np.array(self.items, np.int32),
            origins=np.array([(files[o.file, o.is_line], o.number) for o in self.origins], np.int32).reshape(-1, 2),
            columns=self._columns(),
            token_columns=self._token_columns(),
            names=self._names(),
            files=list(files),
            dropped=self.dropped,
            remarks=self.remarks,
            first={reason: str(origin) for reason, origin in self.first.items()},
        )

    def _columns(self) -> dict[str, np.ndarray]:
        names = self.samples[0].columns if self.samples else ()
        return {name: np.array([sample.columns[name] for sample in self.samples], np.float32) for name in names}

    def _names(self) -> dict[str, Names]:
        columns = self.samples[0].names if self.samples else ()
        return {column: numbered([sample.names[column] for sample in self.samples]) for column in columns}

    def _token_columns(self) -> dict[str, np.ndarray]:
        names = self.samples[0].token_columns if self.samples else ()
        return {name: np.concatenate([sample.token_columns[name] for sample in self.samples]) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkArrays:
    """A chunk with its samples concatenated."""

    ids: np.ndarray
    """int32 [tokens]"""
    weights: np.ndarray
    """float32 [tokens]"""
    lengths: np.ndarray
    """Tokens of each sample, int32 [samples]."""
    sums: np.ndarray
    """Sum of the weights of each sample, float64 [samples]."""
    items: np.ndarray
    """Number of samples in each item, int32 [items]."""
    origins: np.ndarray
    """Index in `files`, and line or row, of each sample: int32 [samples, 2]."""
    columns: Mapping[str, np.ndarray]
    """float32 [samples]"""
    token_columns: Mapping[str, np.ndarray]
    """float32 or int32 [tokens, …]"""
    names: Mapping[str, Names]
    files: list[tuple[str, bool]]
    """File and `is_line` of the origins."""
    dropped: Counter[str]
    remarks: Counter[str]
    first: Mapping[str, str] = field(default_factory=dict)
    """Reason or remark → the place of its first row."""


def _joined(parts: Iterable[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])
