"""Requests of a server that fails for a moment: what its threads do at the same time, in a given order."""

from __future__ import annotations

import threading
from typing import Any, cast

from megabatch.rollout.engine import Completion, Request, Sampling
from megabatch.rollout.vllm.client import UnreachableError
from megabatch.rollout.vllm.pool import Pool
from megabatch.rollout.vllm.server import Server


class Faltering:
    """Fails the first request, and says that it is well only once another thread has begun with it again."""

    url, version, concurrency = "http://faltering", 1, 2

    def __init__(self) -> None:
        self._asked, self._again = 0, threading.Event()

    def begin_update(self, version: int) -> None: ...

    def check_fresh(self) -> None: ...

    def complete(self, request: Request) -> Completion:
        self._asked += 1
        if self._asked == 1:
            raise UnreachableError("a connection was lost")
        self._again.set()
        return Completion(key=request.key, ids=(5,), logps=(-1.0,), versions=(1,), finish="stop")

    def health(self) -> None:
        assert self._again.wait(60), "the request went back before the server is asked how it is"


def test_a_request_that_failed_is_taken_by_another_thread_at_once() -> None:
    pool = Pool([cast(Server, cast(Any, Faltering()))])
    pool.begin_update(1)
    sampling = Sampling(temperature=1.0, max_tokens=1, stop_ids=())
    (one,) = pool.generate([Request(key="a", prompt=(1,), sampling=sampling, seed=0)])
    assert (one.key, one.ids) == ("a", (5,))
