"""The steps of one data-parallel rank: its packs, and what is known of the whole global batch."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.schedule import PLAIN, Cursor, Interleaving, Schedule, cost, deal
from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.objective import Norm
from megabatch.trainer.pack import Pack, collate, row_length_of
from megabatch.trainer.steps import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One data-parallel rank's part of every global batch, and the shape of its rows."""

    dp_rank: int = 0
    dp_size: int = 1
    micro_batch_size: int = 1
    interleaving: Interleaving = PLAIN
    """What the pipeline asks of the number of micro-batches of a step."""
    row_multiple: int = 1
    """Rows are padded to a multiple of it, see `pack.collate`."""
    sequence_multiple: int = 1
    equal_rows: int = 1
    """Data-parallel ranks, one behind the other, whose n-th rows of a step are padded to one length: those whose
    dispatcher of experts exchanges whole rows."""
    equal_sequences: bool = False
    """Sequences of a row are padded to one length."""
    row_length: int = 0
    """Least length of every row: the run's longest where all are padded to it."""
    hidden_size: int = 4096
    """Of the model; weighs long sequences against many when balancing."""


Maker = Callable[[], Step]
"""What makes one step; where the step lies in the data is settled already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """How steps are prepared while others are computed."""

    workers: int
    """Threads; 0 makes each step when it is asked for. numpy and torch release Python's lock for most of the work, and
    threads need neither copies of a batch nor an import of torch each, as processes would."""
    each: int = 1
    """Steps that each of them prepares ahead."""
    pinned: bool = False
    """Whether tensors lie in page-locked memory, from where copies to a GPU go on beside everything else."""


class Batches:
    """Iterates a dataset by a schedule, on one data-parallel rank."""

    def __init__(self, data: TokenCache, schedule: Schedule, *, share: Share, ahead: Ahead = Ahead(workers=0)) -> None:
        self._data, self._schedule, self._share, self._ahead = data, schedule, share, ahead
        self._blank = data.blank

    def train(self, cursor: Cursor) -> Iterator[Step]:
        """Steps without end from a cursor on. Raises: DataError when the cursor does not fit this data."""
        return made_ahead(self._train(cursor), self._ahead)

    def evaluate(self, *, eval_iters: int = -1) -> Iterator[Step]:
        """Batches that hold every sample exactly once, or the first `eval_iters` of them when that is not negative."""
        return made_ahead(self._evaluate(eval_iters), self._ahead)

    def _train(self, cursor: Cursor) -> Iterator[Maker]:
        while True:
            packs, cursor = self._schedule.next(cursor)
            yield partial(self._step, packs, cursor)

    def _evaluate(self, eval_iters: int) -> Iterator[Maker]:
        for number, packs in enumerate(self._schedule.once()):
            if number == eval_iters:
                return
            yield partial(self._step, packs, Cursor())

    def _step(self, packs: np.ndarray, cursor: Cursor) -> Step:
        """Args: `packs` of the schedule that the global batch holds."""
        share = self._share
        samples = [self._schedule.samples(int(pack)) for pack in packs]
        costs = [cost(self._data.lengths[some], hidden_size=share.hidden_size) for some in samples]
        dealt = deal(
            np.array(costs),
            dp_size=share.dp_size,
            micro_batch_size=share.micro_batch_size,
            interleaving=share.interleaving,
        )
        everyone = np.concatenate(samples)
        first = share.dp_rank - share.dp_rank % share.equal_rows
        rounds = zip(*dealt[first : first + share.equal_rows], strict=True)
        row_lengths = [max(self._row_length(samples, places) for places in together) for together in rounds]
        tokens = self._data.lengths[everyone]
        return Step(
            packs=[
                self._pack(packs[places], length)
                for places, length in zip(dealt[share.dp_rank], row_lengths, strict=True)
            ],
            totals={
                Norm.TOKENS: float(self._data.sums[everyone].sum()),
                Norm.SEQUENCES: float(len(everyone)),
                Norm.ITEMS: float(sum(len(self._schedule.packs[int(pack)]) for pack in packs)),
            },
            filled=sum(bool(places) for rank in dealt for places in rank),
            tokens=int(tokens.sum()),
            samples=len(everyone),
            mean_length=float(np.square(tokens).sum() / tokens.sum()),
            cursor=cursor.to_json(),
            epoch=cursor.epoch + cursor.offset / len(self._schedule),
        )

    def _row_length(self, samples: list[np.ndarray], places: list[int]) -> int:
        share = self._share
        lengths = [int(length) for place in places for length in self._data.lengths[samples[place]]]
        if share.equal_sequences:
            lengths = [max(lengths)] * len(lengths) if lengths else []
        return max(row_length_of(lengths, share.row_multiple, share.sequence_multiple), share.row_length)

    def _pack(self, packs: np.ndarray, row_length: int) -> Pack:
        samples: list[Sample] = []
        items: list[int] = []
        for pack in map(int, packs):
            before = items[-1] + 1 if items else 0
            items += (self._schedule.items(pack) + before).tolist()
            samples += [self._data[int(index)] for index in self._schedule.samples(pack)]
        return collate(
            samples,
            items=items,
            blank=self._blank,
            row_multiple=self._share.row_multiple,
            sequence_multiple=self._share.sequence_multiple,
            sequence_length=max((len(s.ids) for s in samples), default=0) if self._share.equal_sequences else 0,
            row_length=row_length,
        )


def made_ahead(makers: Iterator[Maker], how: Ahead) -> Iterator[Step]:
    """The steps of these makers, in their order; an error arrives in place of the step that it belongs to."""
    if how.workers <= 0:
        for make in makers:
            yield make()
        return
    pool = ThreadPoolExecutor(how.workers, thread_name_prefix="megabatch-batches")
    waiting: deque[Future[Step]] = deque()
    is_exiting = sys.is_finalizing  # names of modules are gone when the interpreter drops this generator at its exit
    try:
        for make in _with_errors_at_their_place(makers):
            waiting.append(pool.submit(_made, make, pinned=how.pinned))
            if len(waiting) > how.workers * how.each:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        if not is_exiting():  # all threads have ended by then
            pool.shutdown(cancel_futures=True)


def _with_errors_at_their_place(makers: Iterator[Maker]) -> Iterator[Maker]:
    try:
        yield from makers
    except Exception as e:
        yield partial(_raise, e)


def _raise(error: Exception) -> Step:
    raise error


def _made(make: Maker, *, pinned: bool) -> Step:
    step = make()
    return replace(step, packs=[pack.pinned() for pack in step.packs]) if pinned else step
