"""Several vLLM servers as one rollout engine: requests go to whichever is free, and to another when one fails."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import Completion, Request, RolloutEngine, Scored, UnservedError
from megabatch.rollout.vllm.client import UnreachableError
from megabatch.rollout.vllm.server import Server, StaleError

logger = logging.getLogger(__name__)

_TRIES = 3
"""Of one request, before it fails the round."""


class Pool:
    """Servers with the same model. Those that fail are left out until the next update reaches them again."""

    experts: Literal["per_expert", "fused"] = "per_expert"

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = list(servers)
        self._used: list[Server] = []
        """Servers that have the weights of `version`."""
        self._threads = ThreadPoolExecutor(len(servers), thread_name_prefix="megabatch-servers")

    @property
    def version(self) -> int | None:
        return self._used[0].version if self._used else None

    def members(self) -> list[RolloutEngine]:
        return list(self._used)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Raises: UnservedError with what was generated, when no server with the right weights is left."""
        waiting: queue.SimpleQueue[tuple[Request, int]] = queue.SimpleQueue()
        for request in requests:
            waiting.put((request, 0))
        made: dict[str, Completion] = {}
        while not waiting.empty() and self._used:
            rounds = [_Round(server, waiting) for server in self._used]
            for one in self._threads.map(_Round.run, rounds):
                if one.fresh:
                    made |= one.made
                else:
                    self._drop(one.server, one.reason)
                    for request in one.taken:
                        waiting.put((request, 0))
        if not waiting.empty():
            raise UnservedError(
                f"{len(requests) - len(made)} of {len(requests)} requests were not served: no server with the weights "
                "of this step is left",
                list(made.values()),
            )
        return [made[request.key] for request in requests]

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, ...]]:
        if not self._used:
            raise RolloutError("no server has weights")
        return self._used[0].score(sequences)

    def begin_update(self, version: int) -> None:
        self._used = list(self._servers)
        self._on_each(lambda server: server.begin_update(version))

    def put(self, bucket: Bucket) -> None:
        self._on_each(lambda server: server.put(bucket))

    def end_update(self) -> None:
        self._on_each(Server.end_update)

    def abort_update(self) -> None:
        for server in self._servers:
            server.abort_update()
        self._used = []

    def differing(self, bucket: Bucket) -> list[str] | None:
        return None

    def pause(self) -> None:
        self._on_each(Server.pause)

    def resume(self) -> None:
        self._on_each(Server.resume)

    def sleep(self, level: int) -> None:
        self._on_each(lambda server: server.sleep(level))

    def wake(self) -> None:
        self._on_each(Server.wake)

    def abort(self, keys: Collection[str]) -> None:
        self._on_each(lambda server: server.abort(keys))

    def health(self) -> None:
        for server in self._servers:
            server.health()

    def close(self) -> None:
        for server in self._servers:
            server.close()
        self._threads.shutdown(wait=False)

    def _on_each(self, action: Callable[[Server], None]) -> None:
        """On every used server at once. Raises: RolloutError if a server refuses, or none is left."""
        errors: list[UnreachableError] = []
        for server, error in zip(
            self._used, self._threads.map(lambda one: _gone(action, one), self._used), strict=True
        ):
            if error is not None:
                self._drop(server, str(error))
                errors.append(error)
        if errors and not self._used:
            raise errors[0]

    def _drop(self, server: Server, reason: str) -> None:
        logger.warning("rollout server %s is left out until the next update: %s", server.url, reason)
        self._used = [one for one in self._used if one is not server]


def _gone(action: Callable[[Server], None], server: Server) -> UnreachableError | None:
    try:
        action(server)
    except UnreachableError as e:
        return e
    return None


class _Round:
    """What one server takes from the queue, until the queue is empty or the server fails."""

    def __init__(self, server: Server, waiting: queue.SimpleQueue[tuple[Request, int]]) -> None:
        self.server, self._waiting = server, waiting
        self.made: dict[str, Completion] = {}
        self.taken: list[Request] = []
        self.fresh = True
        """Whether the server had the right weights from the first request to the last."""
        self.reason = ""

    def run(self) -> _Round:
        try:
            self.server.check_fresh()
            with ThreadPoolExecutor(self.server.concurrency) as threads:
                for done in [threads.submit(self._work) for _ in range(self.server.concurrency)]:
                    done.result()
            self.server.check_fresh()
        except (UnreachableError, StaleError) as e:
            self.fresh, self.reason = False, str(e)
        return self

    def _work(self) -> None:
        while self.fresh:
            try:
                request, tries = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self.made[request.key] = self.server.complete(request)
                self.taken.append(request)
            except UnreachableError as e:
                if tries + 1 == _TRIES:
                    raise RolloutError(f"{request.key} failed {_TRIES} times, at last: {e}") from e
                self._waiting.put((request, tries + 1))
                self.server.health()
