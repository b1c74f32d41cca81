"""Requests of a server that fails for a moment: what its threads do at the same time, in a given order."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch

from megabatch.errors import RolloutError
from megabatch.rollout.engine import Completion, Request, Sampling
from megabatch.rollout.vllm.client import Client, UnreachableError
from megabatch.rollout.vllm.pool import Pool
from megabatch.rollout.vllm.server import GoneError, Server
from megabatch.slurm.ports import free_port_block


class Faltering:
    """Fails the first request, and says that it is well only once another thread has begun with it again."""

    url, version, concurrency = "http://faltering", 1, 2

    def __init__(self) -> None:
        self._asked, self._again = 0, threading.Event()

    def begin_update(self, version: int) -> None: ...

    def wake(self, *, cache: bool) -> None: ...

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


class Dead(Server):
    """At an address where nothing answers. Counts how often it is waited for."""

    def __init__(self) -> None:
        client = Client(f"http://127.0.0.1:{free_port_block()}")
        super().__init__(client, owner="test", device=torch.device("cpu"), timeout_s=0.0)
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1
        super().wait()


def test_a_dead_server_is_waited_for_once_while_there_are_others() -> None:
    """Each wait takes `rollout.vllm_server_timeout`, in which the other servers idle."""
    dead, living = Dead(), cast(Server, cast(Any, Faltering()))
    pool = Pool([dead, living])
    pool._used = [dead, living]  # it died after the last update
    for version in (1, 2):
        pool.wake(cache=False)
        pool.begin_update(version)
        assert pool.members() == [living] and dead.waits == 1


def test_servers_that_are_all_dead_are_waited_for_together() -> None:
    """Also one that was given up: it may be the one that comes back."""
    first, second = Dead(), Dead()
    pool = Pool([first, second])
    for one in (first, second):
        pool._used = [one]
        with pytest.raises(GoneError):
            pool.wake(cache=False)
    with pytest.raises(RolloutError, match="did not answer for 0 s"):
        pool.begin_update(1)
    assert (first.waits, second.waits) == (2, 2)
