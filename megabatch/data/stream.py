"""Rows that are read, tokenised and packed while a run trains: no cache, bounded memory, exact resumption.

A stream is a sequence of blocks of a fixed number of rows. Each block is tokenised, shuffled and packed on its own, by
its number and the epoch alone; batches may span blocks and epochs. So three numbers define a place in the stream, and
a run that resumes there reads that block again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megabatch.data.cache.cache_key import settings_of
from megabatch.data.cache.in_memory import gathered, in_memory
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.cache.vocabulary import require_known_ids
from megabatch.data.packing import Packs, pack, singletons
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.files import Line, Row
from megabatch.data.rows.mixing import Mixing, rows_of
from megabatch.data.rows.sources import Source
from megabatch.data.schedule import rng_of
from megabatch.data.tokens.chunk import ChunkArrays
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.workers import CHUNK_ROWS, encoded_chunks
from megabatch.errors import DataError
from megabatch.values import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream resumes; saved in checkpoints."""

    epoch: int = 0
    block: int = 0
    offset: int = 0
    """Number of packs of the block already drawn."""
    data: str = ""
    """`Stream.fingerprint`; "" at the start of a run."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Place:
        """`{}` is the start of a run. Raises: DataError when `saved` is not a place in a stream."""
        if not saved:
            return cls()
        try:
            return cls(int(saved["epoch"]), int(saved["block"]), int(saved["offset"]), str(saved["data"]))
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(
                f"the checkpoint's data cursor {saved!r} is no place in a stream; resume with the data.streaming of "
                "the run that wrote it, or start over with checkpoint.finetune=True"
            ) from e


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples of one global batch, pack by pack."""

    samples: TokenCache
    packs: Sequence[int]
    """Number of items in each pack; a pack's items are adjacent."""
    place: Place
    """The place after this batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Global batches from the rows of some sources, repeated endlessly."""

    sources: Sequence[Source]
    encoding: Encoding
    vocab_size: int
    """Rows of the model's embedding."""
    global_batch_size: int
    seed: int
    shuffle: bool
    """Whether to shuffle the items of a block, and to draw the rows of a `#count` at random."""
    shuffle_epochs: bool
    """Whether each epoch shuffles differently."""
    block_rows: int
    mixing: Mixing | None = None
    """How rows are drawn from the sources; None takes all of them, one source after the other."""
    packing_length: int | None = None
    shares_prompts: bool = False
    """Whether a pack holds the tokens that samples of an item share once."""
    num_proc: int = 1

    @property
    def rows(self) -> int:
        """Rows of a block, rounded up to whole chunks, the unit that tokenising processes return."""
        return -(-self.block_rows // CHUNK_ROWS) * CHUNK_ROWS

    def fingerprint(self, cache_folder: Path) -> str:
        """Digest of what a place refers to. Uses only names and sizes of the data's files; does not read them."""
        digests = Digests(cache_folder)
        files = [[source.text, [[path.name, path.stat().st_size] for path in source.paths]] for source in self.sources]
        settings = settings_of(self.encoding, digests)
        order: list[Any] = [self.seed, self.shuffle, self.shuffle_epochs, self.rows, self.packing_length]
        if self.mixing is not None:
            order.append(asdict(self.mixing))
        if self.packing_length is not None and self.shares_prompts:
            order.append("shared prompts")
        text = json.dumps([files, settings, order], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def batches(self, place: Place) -> Iterator[Drawn]:
        """Endless global batches, starting at a place. Raises: DataError with file and line of a faulty row."""
        waiting: list[tuple[TokenCache, np.ndarray]] = []
        for block, items, after in self._packs(place):
            waiting.append((block, items))
            if len(waiting) == self.global_batch_size:
                yield Drawn(gathered(waiting), [len(items) for _, items in waiting], after)
                waiting = []

    def _packs(self, place: Place) -> Iterator[tuple[TokenCache, np.ndarray, Place]]:
        """For each pack: its block, its items in that block, and the place after it."""
        while True:
            drawn, whole = 0, place.block == place.offset == 0
            for number, block in self._blocks(place):
                packs = self._packed(block, epoch=place.epoch, number=number)
                for offset in range(place.offset if number == place.block else 0, len(packs)):
                    yield block, packs[offset], replace(place, block=number, offset=offset + 1)
                drawn += len(packs)
            if whole and drawn < self.global_batch_size:
                raise DataError(
                    f"batch.global_batch_size={self.global_batch_size} is more than the {drawn} samples or packs of "
                    f"the training data; lower it to {drawn} or less, or add data"
                )
            place = replace(place, epoch=place.epoch + 1, block=0, offset=0)

    def _blocks(self, place: Place) -> Iterator[tuple[int, TokenCache]]:
        """The blocks of an epoch with their numbers, starting at a place."""
        rows = islice(self._rows(), place.block * self.rows, None)
        chunks = encoded_chunks(rows, self.encoding, num_proc=self.num_proc)
        told = _Told(place.epoch)
        number = place.block
        while some := list(islice(chunks, self.rows // CHUNK_ROWS)):
            told.add(some)
            block = in_memory(some)
            require_known_ids(block, rows=self.vocab_size, folder=self.encoding.tokenizer)
            yield number, block
            number += 1
        told.end()

    def _rows(self) -> Iterator[Row | Line]:
        return rows_of(self.sources, seed=self.seed, shuffle=self.shuffle, mixing=self.mixing)

    def _packed(self, block: TokenCache, *, epoch: int, number: int) -> Packs:
        """Raises: DataError for an item longer than a pack."""
        count = len(block.items) - 1
        purpose = f"block {number} of epoch {epoch if self.shuffle_epochs else 0}"
        order = rng_of(self.seed, purpose).permutation(count) if self.shuffle else np.arange(count)
        if self.packing_length is None or not count:
            return singletons(order)
        shared = block.shared(np.arange(len(block))) if self.shares_prompts else 0
        together = np.add.reduceat(block.lengths - shared, block.items[:-1])
        return pack(together, order=order, capacity=self.packing_length)


class _Told:
    """Logs why rows gave no sample: each reason when it first occurs, and all counts at the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._samples = 0
        self._counts: Counter[str] = Counter()

    def add(self, chunks: Sequence[ChunkArrays]) -> None:
        for chunk in chunks:
            self._samples += len(chunk.lengths)
            found = Counter({f"dropped: {reason}": count for reason, count in chunk.dropped.items()})
            found.update(chunk.remarks)
            for what in +found:
                if what not in self._counts:
                    log.warning("stream, epoch %d: some rows %s; their number is told at its end", self._epoch, what)
            self._counts.update(+found)

    def end(self) -> None:
        log.info("stream, epoch %d: its end, after %d samples of this attempt", self._epoch, self._samples)
        for what, count in self._counts.items():
            log.warning("stream, epoch %d: %d rows %s", self._epoch, count, what)
