"""The steps of one data-parallel rank, drawn by a schedule and prepared while others are computed."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.schedule import Cursor, Schedule
from megabatch.trainer.data.global_batch import GlobalBatch, Share
from megabatch.trainer.steps import Step

Maker = Callable[[], Step]
"""Makes one step, whose place in the data is already decided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """How steps are prepared while others are computed."""

    workers: int
    """Threads; 0 makes each step when it is asked for. numpy and torch release Python's lock for most of the work, and
    threads need neither copies of a batch nor an import of torch each, as processes would."""
    each: int = 1
    """Steps that each thread prepares ahead."""
    pinned: bool = False
    """Whether tensors lie in page-locked memory, from where copies to a GPU go on beside everything else."""


class Batches:
    """Iterates a dataset by a schedule, on one data-parallel rank."""

    def __init__(self, data: TokenCache, schedule: Schedule, *, share: Share, ahead: Ahead = Ahead(workers=0)) -> None:
        self._data, self._schedule, self._share, self._ahead = data, schedule, share, ahead

    def train(self, cursor: Cursor) -> Iterator[Step]:
        """Endless steps, starting at a cursor. Raises: DataError when the cursor does not fit this data."""
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
        chosen = packs.tolist()
        batch = GlobalBatch(
            self._data,
            [self._schedule.samples(pack) for pack in chosen],
            [self._schedule.items(pack) for pack in chosen],
        )
        epoch = cursor.epoch + cursor.offset / len(self._schedule)
        return batch.step(self._share, cursor=cursor.to_json(), epoch=epoch)


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
