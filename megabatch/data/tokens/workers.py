"""Tokenising processes: rows in, chunks of samples out, in order and with bounded memory.

We spawn one process, since the caller may hold threads, CUDA or process groups. It imports transformers and loads the
tokenizer once, without torch, and forks the others. Each of these has its own pipe to the caller.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import connection
from multiprocessing.connection import Connection
from queue import SimpleQueue

from megabatch.data.rows.files import Line, Row
from megabatch.data.tokens.auto_tokenizer import import_without_torch
from megabatch.data.tokens.chunk import ChunkArrays
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError

CHUNK_ROWS = 128
"""Few enough that their objects stay in the processor's caches: 512 took a tenth longer."""
_GC_OBJECTS = 20_000
"""Objects between two garbage collections: about a chunk's. With Python's 700, about five rows', collecting takes a
twentieth of the time."""
_TUNABLES = "GLIBC_TUNABLES"

Rows = list[Row | Line]


def encoded_chunks(rows: Iterable[Row | Line], encoding: Encoding, *, num_proc: int = 1) -> Iterator[ChunkArrays]:
    """Chunks of samples in the order of the rows, which is the same for every `num_proc`.

    Encodes a dataset of one chunk in this process, unless a user's own code makes its rows: that runs in processes of
    its own, which it may hang or end. Raises: DataError for the first faulty row, or if a process dies.
    """
    pieces = _chunks(rows)
    first = list(islice(pieces, 2))
    if encoding.preprocess is None and (num_proc <= 1 or len(first) < 2):
        encoder = Encoder(encoding)
        yield from (encoder.encode(piece).arrays() for piece in chain(first, pieces))
        return
    workers = _Workers(encoding, num_proc)
    waiting: deque[Future[ChunkArrays]] = deque()
    try:
        for piece in chain(first, pieces):
            waiting.append(workers.encoded(piece))
            if len(waiting) >= 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except EOFError:
        own = f", or data.preprocess={encoding.preprocess} ended it" if encoding.preprocess else ""
        raise DataError(
            f"a tokenising process died{workers.death()}, probably because memory ran out{own}; lower "
            f"data.dataset_num_proc={num_proc} or ask for more memory"
        ) from None
    finally:
        workers.close()


def _chunks(rows: Iterable[Row | Line]) -> Iterator[Rows]:
    iterator = iter(rows)
    while piece := list(islice(iterator, CHUNK_ROWS)):
        yield piece


class _Workers:
    """The caller's side of the tokenising processes: a thread and a pipe for each."""

    def __init__(self, encoding: Encoding, count: int) -> None:
        """Starts the processes; their errors, also for tokenizer or template, come from `encoded`."""
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self._news, news = context.Pipe(duplex=False)
        self._ends = [ours for ours, _ in pairs]
        self._free: SimpleQueue[Connection] = SimpleQueue()
        theirs = [theirs for _, theirs in pairs]
        self._server = context.Process(target=_serve, args=(encoding, theirs, news), name="megabatch-tokenise")
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="megabatch-tokenise")
        with _keeping_small_blocks():
            self._server.start()
        for end in (*theirs, news):
            end.close()
        for end in self._ends:
            self._free.put(end)

    def encoded(self, piece: Rows) -> Future[ChunkArrays]:
        """The samples of these rows, once a process is free. Raises what encoding raised; EOFError if it died."""
        return self._threads.submit(self._exchanged, piece)

    def _exchanged(self, piece: Rows) -> ChunkArrays:
        end = self._free.get()
        try:
            end.send(piece)
            answer = end.recv()
        except OSError as e:
            raise EOFError from e
        finally:
            self._free.put(end)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, ChunkArrays)
        return answer

    def death(self) -> str:
        """How a process died, in words; "" if unknown."""
        try:
            code = self._news.recv() if self._news.poll(5) else None
        except (EOFError, OSError):  # the process that reports deaths is gone itself
            self._server.join(5)
            code = self._server.exitcode
        return "" if not code else f" (signal {-code})" if code < 0 else f" (exit status {code})"

    def close(self) -> None:
        """Ends the processes; busy ones finish their chunk first."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for end in (*self._ends, self._news):
            end.close()
        self._server.join()


@contextmanager
def _keeping_small_blocks() -> Iterator[None]:
    """Processes started inside this context keep more freed memory blocks by size, if libc is glibc.

    The tokenizer allocates some blocks per token and frees those of a whole chunk at once; glibc keeps 7 of each size
    and merges the others. With 200, the tokenizer takes a seventh less time per row and a process 3 MiB more memory.
    """
    if _TUNABLES in os.environ:  # the user's own
        yield
        return
    os.environ[_TUNABLES] = "glibc.malloc.tcache_count=200"  # read when a process starts, and never again
    try:
        yield
    finally:
        del os.environ[_TUNABLES]


def _serve(encoding: Encoding, ends: list[Connection], news: Connection) -> None:
    """Loads the tokenizer, starts a process for each pipe end, and reports how any of them died."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # no warning that torch is missing
    import_without_torch()
    encoder: Encoder | Exception
    try:
        encoder = Encoder(encoding)
    except Exception as e:
        encoder = _portable(e)
    gc.collect()
    gc.freeze()  # what was loaded stays, so the garbage collector need not scan it again
    gc.set_threshold(_GC_OBJECTS)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(encoder, end, [*ends, news])) for end in ends]
    for worker in workers:
        worker.start()
    for end in ends:
        end.close()
    while workers:
        ended = connection.wait([worker.sentinel for worker in workers])
        for worker in [worker for worker in workers if worker.sentinel in ended]:
            workers.remove(worker)
            worker.join()
            if worker.exitcode:
                news.send(worker.exitcode)


def _work(encoder: Encoder | Exception, end: Connection, inherited: list[Connection]) -> None:
    """Answers each list of rows with its chunk, or with the error, until the caller closes the pipe."""
    for other in inherited:
        if other is not end:
            other.close()  # otherwise nobody would notice when the process that owns it dies
    try:
        while True:
            end.send(_answer(encoder, end.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(encoder: Encoder | Exception, rows: Rows) -> ChunkArrays | Exception:
    if isinstance(encoder, Exception):
        return encoder
    try:
        return encoder.encode(rows).arrays()
    except Exception as e:
        return _portable(e)


def _portable(error: Exception) -> Exception:
    """The error in a form that can be sent to the caller; errors that are not ours carry their traceback as a note."""
    if not isinstance(error, DataError):
        error.add_note(traceback.format_exc())
    return error
