"""Tokenising processes: rows in, chunks of samples out, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from megabatch.errors import DataError
from megabatch.trainer.data.files import Row
from megabatch.trainer.data.samples import Chunk, Encoder, Encoding

CHUNK_ROWS = 512

_encoder: Encoder | None = None  # of this tokenising process


def encoded_chunks(rows: Iterable[Row], encoding: Encoding, *, num_proc: int = 1) -> Iterator[Chunk]:
    """Chunks of samples in the order of the rows, which is the same for every `num_proc`.

    Processes are spawned, not forked: the caller may hold threads, CUDA or process groups. A dataset of one chunk is
    encoded here. Raises: DataError of the first faulty row, or when a process dies.
    """
    encoder = Encoder(encoding)  # here too, so that a faulty tokenizer or template is one clear error
    pieces = _chunks(rows)
    first = list(islice(pieces, 2))
    if num_proc <= 1 or len(first) < 2:
        yield from map(encoder.encode, chain(first, pieces))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start, initargs=(encoding,)) as pool:
        waiting: deque[Future[Chunk]] = deque()
        try:
            for piece in chain(first, pieces):
                waiting.append(pool.submit(_encode, piece))
                if len(waiting) >= 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as e:
            raise DataError(
                f"a tokenising process died, probably for lack of memory; lower data.dataset_num_proc={num_proc} or "
                f"ask for more memory"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while piece := list(islice(iterator, CHUNK_ROWS)):
        yield piece


def _start(encoding: Encoding) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    global _encoder  # noqa: PLW0603
    _encoder = Encoder(encoding)


def _encode(rows: list[Row]) -> Chunk:
    assert _encoder is not None
    return _encoder.encode(rows)
