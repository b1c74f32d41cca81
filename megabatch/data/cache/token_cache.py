"""Tokenised datasets on disk: written once by one process, memory-mapped by every rank.

A cache is a folder named by a digest of everything that decides a token, see `cache_key`. It is renamed into place
when complete, so it can live on shared storage.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megabatch.data.cache import cache_files
from megabatch.data.cache.cache_key import cache_key
from megabatch.data.packing import samples_of
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.files import Origin
from megabatch.data.rows.mixing import Mixing, rows_of
from megabatch.data.rows.sources import Source
from megabatch.data.tokens.chunk import ChunkArrays, Names
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Sample
from megabatch.data.tokens.shared import SHARED
from megabatch.data.tokens.workers import encoded_chunks
from megabatch.errors import DataError
from megabatch.values import dataclass

log = logging.getLogger(__name__)

_MANY = 0.01
"""Dropping this share of the rows or more is worth a warning."""


@dataclass(frozen=True, slots=True)
class TokenCache:
    """The samples of one dataset, memory-mapped."""

    path: Path
    ids: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)
    """First token of each sample, int64 [samples]."""
    lengths: np.ndarray = field(repr=False)
    """Tokens of each sample, int64 [samples]."""
    sums: np.ndarray = field(repr=False)
    """Sum of the loss weights of each sample, float64 [samples]."""
    origins: np.ndarray = field(repr=False)
    """Source and line of each sample, int32 [samples, 2]."""
    items: np.ndarray = field(repr=False)
    """First sample of each item, then the number of samples: int64 [items + 1]. An item's samples stay together; in
    most datasets each sample is an item."""
    columns: Mapping[str, np.ndarray] = field(repr=False)
    """Further values per sample, float32 [samples] each."""
    token_columns: Mapping[str, np.ndarray] = field(repr=False)
    """Further values per token, float32 or int32 [tokens, …] each, as long as `ids`."""
    names: Mapping[str, Names] = field(repr=False)
    """Names that many samples share, by column."""
    meta: dict[str, Any] = field(repr=False)
    content: str
    """Digest of the tokens, weights and lengths of all samples, in order: 16 hexadecimal digits."""

    @classmethod
    def build(
        cls,
        sources: Sequence[Source],
        encoding: Encoding,
        *,
        cache_dir: Path,
        seed: int = 42,
        shuffle: bool = True,
        mixing: Mixing | None = None,
        num_proc: int = 1,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> Path:
        """Builds the cache of these sources unless an intact one exists; returns its path. Call it in one process.

        Args: `seed` and `shuffle` select the rows of a `#count`; `mixing`: how rows are drawn from the sources, None
        takes all; `num_proc`: number of tokenising processes; `on_chunk`: called after every hundred or so rows.
        Raises: DataError for a faulty row, no usable sample, or a disk that cannot hold the cache.
        """
        digests = Digests(cache_dir)
        key = cache_key(sources, encoding, seed=seed, shuffle=shuffle, digests=digests, mixing=mixing)
        path = Path(cache_dir) / key
        rows = rows_of(sources, seed=seed, shuffle=shuffle, mixing=mixing)
        try:
            digests.save()
            if path.exists():
                if found := cls._sound(path, digests):
                    log.info("token cache %s: %d samples, %d tokens", path, len(found), len(found.ids))
                    return path
                cache_files.remove(path)
            chunks = _each(encoded_chunks(rows, encoding, num_proc=num_proc), on_chunk)
            cache_files.write(path, chunks, digests=digests)
        except OSError as e:
            raise DataError(
                f"{path}: the token cache cannot be written ({e.strerror or e}); free space there or choose another "
                f"cache folder"
            ) from e
        finally:
            digests.save()
        log.info("token cache %s: built now", path)
        cls.open(path).log_summary()
        return path

    @classmethod
    def _sound(cls, path: Path, digests: Digests) -> TokenCache | None:
        try:
            return cls.open(path, digests=digests)
        except DataError as e:
            log.warning("rebuilding a token cache: %s", e)
            return None

    @classmethod
    def open(cls, path: Path, *, digests: Digests | None = None) -> TokenCache:
        """Maps a cache; with `digests`, verifies its content and reads only files without a remembered digest.

        Raises: DataError for a damaged cache.
        """
        try:
            meta = cache_files.read_meta(path)
            content = str(meta["content"])
            arrays = {
                name: cache_files.column(path, name, found, digests=digests) for name, found in meta["files"].items()
            }
            lengths: np.ndarray = arrays["lengths"].astype(np.int64)
            items = _bounds(arrays["items"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path}: damaged token cache ({e}); delete the folder to rebuild it") from e
        return cls(
            path=path,
            ids=arrays["ids"],
            weights=arrays["weights"],
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            sums=np.array(arrays["sums"]),
            origins=arrays["origins"].reshape(-1, 2),
            items=items,
            columns=_named(arrays, cache_files.COLUMN),
            token_columns=_named(arrays, cache_files.TOKEN_COLUMN),
            names={
                column: Names(meta["names"][column], numbers)
                for column, numbers in _named(arrays, cache_files.NAME).items()
            },
            meta=meta,
            content=content,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        part = slice(self.starts[index], self.starts[index] + self.lengths[index])
        source, number = map(int, self.origins[index])
        columns: dict[str, Any] = {name: float(values[index]) for name, values in self.columns.items()}
        columns |= {name: int(found.numbers[index]) for name, found in self.names.items()}
        return Sample(
            np.array(self.ids[part]),
            np.array(self.weights[part]),
            {"source": source, "number": number, **columns},
            {name: np.array(values[part]) for name, values in self.token_columns.items()},
        )

    def shared(self, samples: np.ndarray) -> np.ndarray:
        """How many tokens each of these has in common with the first of its item (`data.tokens.shared`), int64; 0 in
        data of another kind."""
        if SHARED not in self.columns:
            return np.zeros(len(samples), np.int64)
        return np.asarray(self.columns[SHARED][samples]).astype(np.int64)

    @property
    def blank(self) -> Sample:
        """A sample without tokens, with the columns of the others and their types."""
        return Sample(
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
            {"source": 0, "number": 0, **dict.fromkeys(self.columns, 0.0), **dict.fromkeys(self.names, 0)},
            {name: np.zeros((0, *values.shape[1:]), values.dtype) for name, values in self.token_columns.items()},
        )

    def origin(self, index: int) -> Origin:
        """Where a sample was read from."""
        return self.place(*map(int, self.origins[index]))

    def place(self, source: int, number: int) -> Origin:
        """The origin that a sample's columns `source` and `number` refer to."""
        file, is_line = self.meta["sources"][source]
        return Origin(file, number, is_line)

    @property
    def max_id(self) -> int:
        """Largest token id, to compare with the model's vocabulary."""
        return int(self.meta["max_id"])

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that gave no sample: reason → count."""
        return dict(self.meta["dropped"])

    def subset(self, items: np.ndarray) -> TokenCache:
        """The same cache with only these items."""
        chosen = hashlib.blake2b(self.content.encode(), digest_size=8)
        chosen.update(np.ascontiguousarray(items, np.int64).tobytes())
        samples = samples_of(items, self.items)
        return replace(
            self,
            starts=self.starts[samples],
            lengths=self.lengths[samples],
            sums=self.sums[samples],
            origins=self.origins[samples],
            items=_bounds(np.diff(self.items)[items]),
            columns={name: values[samples] for name, values in self.columns.items()},
            names={name: Names(found.names, found.numbers[samples]) for name, found in self.names.items()},
            content=chosen.hexdigest(),
        )

    def numbered(self, column: str, names: Sequence[str]) -> TokenCache:
        """The same cache with a name column re-indexed into this list, which must hold all of its names."""
        return replace(self, names={**self.names, column: self.names[column].among(names)})

    def split(self, ratio: float, *, seed: int, whole_rows: bool = False) -> tuple[TokenCache, TokenCache]:
        """(training, validation): a seeded random `ratio` of the items is for validation; both keep the dataset's
        order. Args: whole_rows: takes `ratio` of the rows, each with all items that were made of it.

        Raises: DataError when either part would be empty.
        """
        row_of = self._row_of_item() if whole_rows else np.arange(len(self.items) - 1)
        units = int(row_of.max(initial=-1)) + 1
        count = round(units * ratio)
        if not 0 < count < units:
            raise DataError(
                f"data.split_dataset_ratio={ratio} of {units} {'rows' if whole_rows else 'samples'} leaves {count} "
                f"for validation; both parts need at least one: change the ratio or give data.val_dataset"
            )
        chosen: np.ndarray = np.zeros(units, bool)
        chosen[np.random.default_rng([seed, units]).permutation(units)[:count]] = True
        held_out = chosen[row_of]
        return self.subset(np.flatnonzero(~held_out)), self.subset(np.flatnonzero(held_out))

    def _row_of_item(self) -> np.ndarray:
        """The number of the row that each item was made of, int64 [items]."""
        firsts = self.origins[self.items[:-1]].astype(np.int64)
        return np.unique(firsts[:, 0] << 32 | firsts[:, 1], return_inverse=True)[1]

    def log_summary(self) -> None:
        """Logs the number of samples and tokens, and how many rows were dropped and why; warns if they are many."""
        learned = int(np.count_nonzero(self.weights))
        log.info("%d samples, %d tokens, %d trained on", len(self), len(self.ids), learned)
        rows = len(self.items) - 1 + sum(self.dropped.values())
        first = self.meta.get("first", {})

        def beginning(reason: str) -> str:
            return f"; the first is {first[reason]}" if reason in first else ""

        for reason, count in self.dropped.items():
            level = logging.WARNING if count >= _MANY * rows else logging.INFO
            share = 100 * count / rows
            log.log(level, "%d of %d rows (%.1f %%) dropped: %s%s", count, rows, share, reason, beginning(reason))
        for remark, count in self.meta.get("remarks", {}).items():
            log.warning("%d rows: %s%s", count, remark, beginning(remark))


def _each(chunks: Iterable[ChunkArrays], done: Callable[[], None]) -> Iterator[ChunkArrays]:
    for chunk in chunks:
        yield chunk
        done()


def _bounds(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _named(arrays: Mapping[str, np.ndarray], beginning: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(beginning): values for name, values in arrays.items() if name.startswith(beginning)}
