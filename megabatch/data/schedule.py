"""Which samples form each optimizer step, and which data-parallel rank computes which of them. Pure: no I/O, no torch.

Seed, epoch and lengths alone decide the global batch; only then do we deal it to ranks and micro-batches. So it is the
same for every data-parallel size and micro_batch_size.

Epochs follow each other without a gap: if the rest of an epoch does not fill a batch, the next epoch does. So each
epoch draws every pack exactly once, and the last of `max_epochs` may stop before its last packs.

Samples that belong together (a pair, the answers to one prompt) form an item. A pack holds whole items: as many as fit
if the run packs, else one. A global batch counts packs.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from megabatch.data.packing import Packs, pack, samples_of, singletons
from megabatch.errors import DataError
from megabatch.plan.batch import train_iters
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Cursor:
    """Everything that decides the next batch, besides the schedule; saved in checkpoints."""

    epoch: int = 0
    offset: int = 0
    """Number of packs of this epoch already drawn; all of them means the start of the next epoch."""
    data: str = ""
    """`Schedule.fingerprint` of the schedule that advanced it; "" before the first batch. Without a colon it covers
    only order and lengths: such checkpoints predate the comparison of contents."""

    @property
    def knows_content(self) -> bool:
        """Whether the cursor can tell that the dataset's content has changed."""
        return not self.data or ":" in self.data

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Cursor:
        """`{}` is the start of a run. Raises: DataError when `saved` is not a cursor."""
        if not saved:
            return cls()
        try:
            return cls(int(saved["epoch"]), int(saved["offset"]), str(saved["data"]))
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"the checkpoint's data cursor {saved!r} cannot be read ({e})") from e


class Schedule:
    """The order of all samples over all epochs, cut into global batches."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        global_batch_size: int,
        items: np.ndarray | None = None,
        shared: np.ndarray | None = None,
        seed: int = 42,
        dataset_shuffle: bool = True,
        train_dataloader_shuffle: bool = True,
        packing_length: int | None = None,
        group_by_length: bool = False,
        content: str = "",
    ) -> None:
        """Args: `lengths` int [samples] in tokens; `items` int64 [items + 1]: first sample of each item, see
        `TokenCache.items`, None if each sample is an item; `shared` int [samples]: tokens of each sample that a row
        has only in the first of its item (`TokenCache.shared`), None for none; `packing_length`: tokens of a pack,
        None for no packing; `content`: digest of the samples' tokens, `TokenCache.content`.

        `dataset_shuffle` shuffles the items once; `train_dataloader_shuffle` shuffles the packs again in each epoch;
        `group_by_length` sorts the packs by length, up to 50 batches at a time.
        Raises: DataError for an item longer than `packing_length`.
        """
        self.global_batch_size = global_batch_size
        self._seed = seed
        self._shuffle = train_dataloader_shuffle
        self._bounds: np.ndarray = np.arange(len(lengths) + 1) if items is None else items
        self._grouped = len(self._bounds) <= len(lengths)
        own = lengths if shared is None else lengths - shared
        together = np.add.reduceat(own, self._bounds[:-1]) if self._grouped else own
        order = rng_of(seed, "dataset").permutation(len(together)) if dataset_shuffle else np.arange(len(together))
        self.packs: Packs = (
            singletons(order) if packing_length is None else pack(together, order=order, capacity=packing_length)
        )
        self._tokens = self._pack_lengths(together) if group_by_length else None
        self.drawn = "packs" if packing_length is not None else "items" if self._grouped else "samples"
        """The word for what a global batch counts."""
        settings: tuple[Any, ...] = (seed, dataset_shuffle, train_dataloader_shuffle, packing_length)
        if group_by_length:
            settings += ("by length", self._window)
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(own if packing_length or group_by_length else lengths, np.int64).tobytes())
        if self._grouped:
            digest.update(np.ascontiguousarray(self._bounds, np.int64).tobytes())
        self.fingerprint = f"{digest.hexdigest()}:{content}"
        """Digests of what a cursor's offset refers to, `order:content`; independent of batch sizes and ranks."""
        self.order = lru_cache(maxsize=2)(self._order)
        """epoch → pack indices in drawing order, int64 [packs]."""

    def __len__(self) -> int:
        return len(self.packs)

    def samples(self, pack: int) -> np.ndarray:
        """The samples of a pack, int64; those of an item are adjacent."""
        return samples_of(self.packs[pack], self._bounds) if self._grouped else self.packs[pack]

    def items(self, pack: int) -> np.ndarray:
        """The item index of each sample of a pack, from 0, int64."""
        items = self.packs[pack]
        return np.repeat(np.arange(len(items)), self._bounds[items + 1] - self._bounds[items])

    def longest(self, lengths: np.ndarray) -> int:
        """Tokens in the longest pack, if samples have these lengths."""
        each = np.add.reduceat(lengths, self._bounds[:-1]) if self._grouped else lengths
        return int(self._pack_lengths(each).max())

    def _pack_lengths(self, items: np.ndarray) -> np.ndarray:
        """Tokens in each pack, if items have these lengths."""
        return np.add.reduceat(items[self.packs.members], self.packs.starts[:-1])

    def require_a_batch(self) -> None:
        """Raises: DataError when an epoch is smaller than a global batch, which would then repeat samples."""
        if self.global_batch_size > len(self):
            raise DataError(
                f"batch.global_batch_size={self.global_batch_size} is more than the {len(self)} {self.drawn} of the "
                f"training data; lower it to {len(self)} or less, or add data"
            )

    def train_iters(self, max_epochs: int) -> int:
        """Optimizer steps in `max_epochs` epochs. Raises: DataError when an epoch is smaller than a global batch."""
        self.require_a_batch()
        return train_iters(len(self), epochs=max_epochs, global_batch_size=self.global_batch_size)

    def require_own(self, cursor: Cursor) -> None:
        """Raises: DataError when the cursor was saved for other data than this schedule's."""
        if not cursor.data:
            return
        order, _, content = self.fingerprint.partition(":")
        its_order, _, its_content = cursor.data.partition(":")
        if its_order != order:
            raise DataError(
                "the checkpoint's data cursor belongs to other samples, seed, shuffling or packing than this run's; "
                "resume with the settings of the run that wrote it, or start over with checkpoint.finetune=True"
            )
        if cursor.knows_content and its_content != content:
            raise DataError(
                "the training data has other tokens than when the checkpoint was written, though every sample has the "
                "same length: its files, the tokenizer or the template were changed; resume with those of the run "
                "that wrote it, or start over with checkpoint.finetune=True"
            )

    def next(self, cursor: Cursor) -> tuple[np.ndarray, Cursor]:
        """Packs of the next global batch, int64 [global_batch_size], and the cursor after it.

        Raises: DataError when the cursor was saved for other data, or an epoch is smaller than a global batch.
        """
        self.require_a_batch()
        self.require_own(cursor)
        epoch, offset = divmod(cursor.epoch * len(self) + cursor.offset, len(self))
        packs = self.order(epoch)[offset : offset + self.global_batch_size]
        stop = offset + len(packs)
        if rest := self.global_batch_size - len(packs):
            epoch, stop = epoch + 1, rest
            packs = np.concatenate([packs, self.order(epoch)[:rest]])
        return packs, Cursor(epoch, stop, self.fingerprint)

    def once(self) -> Iterator[np.ndarray]:
        """Yields every pack exactly once, without the shuffle per epoch, for evaluation. The last batch may be
        smaller."""
        for first in range(0, len(self), self.global_batch_size):
            yield np.arange(first, min(first + self.global_batch_size, len(self)))

    def _order(self, epoch: int) -> np.ndarray:
        rng = rng_of(self._seed, f"epoch {epoch}")
        order = rng.permutation(len(self)) if self._shuffle else np.arange(len(self))
        return order if self._tokens is None else sorted_in_windows(order, self._tokens, window=self._window)

    @property
    def _window(self) -> int:
        """How many packs are sorted together: 50 batches, or fewer, so that an epoch has about four windows."""
        return self.global_batch_size * max(1, min(50, len(self) // (4 * self.global_batch_size)))


def sorted_in_windows(order: np.ndarray, lengths: np.ndarray, *, window: int) -> np.ndarray:
    """An order in which neighbours have similar lengths: sorts each window, descending and ascending in turn.

    The window with the longest pack comes first and starts with it, so that a lack of memory shows at once.
    """
    windows = [order[first : first + window] for first in range(0, len(order), window)]
    windows.insert(0, windows.pop(int(np.argmax(lengths[order])) // window))
    signs = [(-1, 1)[number % 2] for number in range(len(windows))]
    return np.concatenate(
        [some[np.argsort(sign * lengths[some], kind="stable")] for some, sign in zip(windows, signs, strict=True)]
    )


def cost(lengths: np.ndarray, *, hidden_size: int, shared: np.ndarray | float = 0) -> float:
    """Relative cost of computing sequences of these lengths, without the tokens that each shares with an earlier one.

    A sequence of n tokens costs n + n² / (12 · hidden_size): per token, the matrices of a transformer layer take about
    24 · hidden_size² FLOPs and causal attention about 2 · n · hidden_size.
    """
    tokens: np.ndarray = lengths.astype(np.float64)
    return float((tokens - shared + (tokens**2 - shared**2) / (12 * hidden_size)).sum())


@dataclass(frozen=True, slots=True)
class Interleaving:
    """What an interleaved pipeline requires of the number of micro-batches; the default requires at least one."""

    stages: int = 1
    """Pipeline ranks."""
    group: int = 1
    """Micro-batches that go through a chunk of layers in a row; at least `stages`."""

    def rounds(self, needed: int) -> int:
        """The smallest number of micro-batches, at least `needed`, that megatron-core's interleaved schedule accepts.

        It accepts at least one whole group; whatever follows the whole groups must have at least one micro-batch for
        each stage.
        """
        count = max(needed, self.group)
        rest = count % self.group
        return count if rest == 0 else count + max(self.stages - rest, 0)


PLAIN = Interleaving()


def deal(
    costs: np.ndarray, *, dp_size: int, micro_batch_size: int, interleaving: Interleaving = PLAIN
) -> list[list[list[int]]]:
    """Deals a global batch: [data-parallel rank][micro-batch] → positions in `costs`.

    Every rank gets the same number of micro-batches, one that `interleaving` accepts, each of `micro_batch_size`
    positions; if the batch is too small for that, some hold fewer or none. Balances costs between ranks over the step,
    and between the ranks' n-th micro-batches, which expert-parallel ranks compute in lock step. The costliest come
    first, so that a lack of memory shows at once.
    """
    rounds = interleaving.rounds(-(-len(costs) // (dp_size * micro_batch_size)))
    micro_batches = _balanced(costs, groups=rounds * dp_size, size=micro_batch_size)
    totals = [float(costs[group].sum()) for group in micro_batches]
    by_cost = sorted(range(len(micro_batches)), key=lambda index: (-totals[index], index))
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    loads = [0.0] * dp_size
    for first in range(0, len(by_cost), dp_size):
        lightest_first = sorted(range(dp_size), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(lightest_first, by_cost[first : first + dp_size], strict=True):
            ranks[rank].append(micro_batches[index])
            loads[rank] += totals[index]
    return ranks


def _balanced(costs: np.ndarray, *, groups: int, size: int) -> list[list[int]]:
    """Deals positions to `groups` groups of at most `size`: costliest first, each to the cheapest group with room."""
    members: list[list[int]] = [[] for _ in range(groups)]
    heap = [(0.0, group) for group in range(groups)]
    for position in np.argsort(-costs, kind="stable").tolist():
        load, group = heapq.heappop(heap)
        members[group].append(position)
        if len(members[group]) < size:
            heapq.heappush(heap, (load + float(costs[position]), group))
    return members


def rng_of(seed: int, purpose: str) -> np.random.Generator:
    """A PCG64 generator for one purpose, derived from the seed."""
    words = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(words, "little")))
