"""Waiting for other ranks however long they take, and ending ranks that wait in vain for one that failed.

A collective gives up after `distributed_timeout_minutes`, and where the collectives are not ours (vLLM inside the
ranks) a rank that fails leaves the others in them. So ranks tell each other through torch's store, which rank 0 hosts:
when rank 0 is gone, every wait ends at once. When another rank is gone, the launcher ends the others.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megabatch.errors import ElsewhereError, MegabatchError
from megabatch.trainer import failures

_AT_A_TIME = timedelta(seconds=30)
"""Of one question to the store; then it is asked again."""
_LOOK_S = 0.5
_GRACE_S = 3.0
"""After another rank failed: time to come out of the section by itself."""
_made = itertools.count()
"""Numbers the objects of a process, the same on every rank, so that each has keys of its own."""


class Waiting:
    """Every rank calls everything together."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Connects to the store of the world's rendezvous, beside the process groups' own connections."""
        self._rank, self._world_size = rank, world_size
        self._calls = itertools.count()
        self._old: list[str] = []
        """Keys that every rank will have read when all meet again."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, None, is_master=False, wait_for_workers=False)
        self._store: dist.Store = dist.PrefixStore(f"megabatch/{next(_made)}", store)

    def for_main(self) -> None:
        """Returns once rank 0 is here. Raises: RuntimeError when rank 0 is gone."""
        self._pass(f"main/{next(self._calls)}", opens=self._rank == 0)

    def for_all(self, *, stays: bool = True) -> None:
        """Returns once every rank is here. Raises: RuntimeError when rank 0 is gone.

        Args: stays: False for a rank that says that it was here and goes on.
        """
        key = f"all/{next(self._calls)}"
        is_last = self._store.add(f"{key}/came", 1) == self._world_size
        old, self._old = self._old, [f"{key}/came"]
        if is_last:
            for one in old:
                self._store.delete_key(one)
        if is_last or stays:
            self._pass(key, opens=is_last)
        else:
            self._old.append(key)

    def _pass(self, key: str, *, opens: bool) -> None:
        self._old.append(key)
        if opens:
            self._store.set(key, "open")
            return
        while True:
            try:
                self._store.wait([key], _AT_A_TIME)
                return
            except dist.DistStoreError:
                """Not yet."""

    @contextmanager
    def ended_together(self) -> Iterator[Callable[[MegabatchError], None]]:
        """Inside, a rank that fails and says so ends those that do not come out by themselves within seconds.

        Yields: what it says so with.
        """
        key, over = f"failed/{next(self._calls)}", threading.Event()
        watch = threading.Thread(target=self._watch, args=(key, over), name="megabatch-waiting", daemon=True)
        watch.start()
        try:
            yield lambda error: self._store.set(key, pickle.dumps((self._rank, error)))
        finally:
            over.set()
            watch.join()

    def _watch(self, key: str, over: threading.Event) -> None:
        try:
            while not over.wait(_LOOK_S):
                if self._store.check([key]):
                    rank, error = pickle.loads(self._store.get(key))
                    _leave(ElsewhereError(error, rank), over)
                    return
        except dist.DistNetworkError as e:
            _leave(e, over)


def _leave(error: Exception, over: threading.Event) -> None:
    """Ends the process from a thread: the main one is in a collective, which no exception reaches."""
    if over.wait(_GRACE_S):
        return
    code = failures.report(error)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
