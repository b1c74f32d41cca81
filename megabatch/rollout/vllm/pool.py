"""Several vLLM servers as one rollout engine: requests go to whichever is free, and to another when one fails."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Literal

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import Adapter, Completion, Request, RolloutEngine, Scored, UnservedError
from megabatch.rollout.feed import Feed
from megabatch.rollout.vllm.client import UnreachableError
from megabatch.rollout.vllm.server import GoneError, Server, StaleError

logger = logging.getLogger(__name__)

_TRIES = 3
"""Of one request, before it fails the round."""
_LOOK_S = 0.05
"""How often `Pool.stream` looks for completions, and whether it has to stop."""


class Pool:
    """Servers with the same model. Those that fail are left out until the next update reaches them again.

    One that did not answer for as long as a server is waited for is only asked by the next updates, while there are
    others: waiting for it would hold up each of them.
    """

    experts: Literal["per_expert", "fused"] = "per_expert"

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = list(servers)
        self._used: list[Server] = []
        """Servers that have the weights of `version`."""
        self._given_up: set[Server] = set()
        """Those that were waited for in vain, and have not answered since."""
        self._threads = ThreadPoolExecutor(len(servers), thread_name_prefix="megabatch-servers")

    @property
    def version(self) -> int | None:
        return self._used[0].version if self._used else None

    def members(self) -> list[RolloutEngine]:
        return list(self._used)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Raises: UnservedError with what was generated, when no server with the right weights is left."""
        made: dict[str, Completion] = {}
        try:
            for some in self.stream(Feed(requests)):
                made |= {one.key: one for one in some}
        except UnservedError as e:
            raise UnservedError(str(e), list(made.values())) from e
        return [made[request.key] for request in requests]

    def stream(self, feed: Feed) -> Iterator[list[Completion]]:
        """Completions as they come, each made with the weights of `version`, until the feed is over. All must be
        consumed before the next call or update.

        Once the feed is stopped, what is not done comes back as `aborted`, with the tokens that it has. Raises:
        UnservedError without completions, when no server is left.
        """
        while self._used and not feed.is_over:
            for some in self._served([_Round(server, feed) for server in self._used], feed):
                feed.done([one.key for one in some])
                yield some
        if feed.is_stopped:
            yield [Completion(key=key, ids=(), logps=(), versions=(), finish="aborted") for key in feed.left]
        elif not feed.is_over:
            raise UnservedError(
                f"no server with the weights of this step is left; requests that were not served: {len(feed.left)}", ()
            )

    def _served(self, rounds: Sequence[_Round], feed: Feed) -> Iterator[list[Completion]]:
        """What servers make until there is nothing more to take; requests of those that fail go back at once, for
        others that wait for some."""
        running = {self._threads.submit(one.run): one for one in rounds}
        try:
            while running:
                ended = wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED).done
                for one in running.values():
                    one.obey()
                    yield from one.fresh_ones()
                for done in ended:
                    one = running.pop(done)
                    done.result()
                    yield from one.fresh_ones()
                    if not one.fresh:
                        self._drop(one.server, one.reason)
                        feed.put(one.unproven())
        except BaseException:
            feed.stop()
            wait(running)
            raise

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, ...]]:
        if not self._used:
            raise RolloutError("no server has weights")
        return self._used[0].score(sequences)

    def begin_update(self, version: int) -> None:
        self._begin(lambda server: server.begin_update(version))

    @property
    def has_base(self) -> bool:
        return all(self._threads.map(lambda server: server.has_base, self._servers))

    def begin_adapter(self, version: int, adapter: Adapter) -> None:
        self._begin(lambda server: server.begin_adapter(version, adapter))

    def _begin(self, action: Callable[[Server], None]) -> None:
        """On every server. Raises: RolloutError, and no `LostError`, where none is left: each was waited for."""
        answers = self._threads.map(lambda one: one not in self._given_up or _answers(one), self._servers)
        there = [one for one, does in zip(self._servers, answers, strict=True) if does]
        self._used = there or list(self._servers)
        self._given_up -= set(self._used)
        try:
            self._on_each(action)
        except UnreachableError as e:
            raise RolloutError(str(e)) from e

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

    def wake(self, *, cache: bool = True) -> None:
        """Raises: RolloutError, and no `LostError`, where each of all servers was waited for: an update that is begun
        again would wait for them as long again."""
        were_all_used = len(self._used) == len(self._servers)
        try:
            self._on_each(lambda server: server.wake(cache=cache))
        except GoneError as e:
            if not were_all_used:
                raise
            raise RolloutError(str(e)) from e

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
                self._given_up |= {server} if isinstance(error, GoneError) else set()
        if errors and not self._used:
            raise next((error for error in errors if not isinstance(error, GoneError)), errors[0])

    def _drop(self, server: Server, reason: str) -> None:
        logger.warning("rollout server %s is left out until the next update: %s", server.url, reason)
        self._used = [one for one in self._used if one is not server]


def _gone(action: Callable[[Server], None], server: Server) -> UnreachableError | None:
    try:
        action(server)
    except UnreachableError as e:
        return e
    return None


def _answers(server: Server) -> bool:
    """Whether it does now."""
    try:
        server.health()
    except UnreachableError:
        return False
    return True


class _Round:
    """What one server takes from the feed, until that is over, the server fails, or the work has to stop."""

    def __init__(self, server: Server, feed: Feed) -> None:
        self.server, self._feed = server, feed
        self._asked: dict[str, Request] = {}
        """Requests that the server works on."""
        self._made: queue.SimpleQueue[tuple[Request, Completion]] = queue.SimpleQueue()
        self._unproven: list[Request] = []
        self.fresh = True
        """Whether the server had the right weights whenever it was asked."""
        self.reason = ""
        self._refused = False
        """Whether a request failed for good."""

    def run(self) -> None:
        try:
            self.server.check_fresh()
            with ThreadPoolExecutor(self.server.concurrency) as threads:
                for done in [threads.submit(self._work) for _ in range(self.server.concurrency)]:
                    done.result()
        except (UnreachableError, StaleError) as e:
            self._fail(e)

    def fresh_ones(self) -> Iterator[list[Completion]]:
        """Completions since the last call, if the server still has the weights that it was given: it cannot have had
        others in between, because only an update by this trainer gives it that name."""
        taken: list[tuple[Request, Completion]] = []
        while True:
            try:
                taken.append(self._made.get_nowait())
            except queue.Empty:
                break
        if not taken:
            return
        try:
            if self.fresh:
                self.server.check_fresh()
                yield [one for _, one in taken]
                return
        except (UnreachableError, StaleError) as e:
            self._fail(e)
        self._unproven += [request for request, _ in taken]

    def unproven(self) -> list[Request]:
        """Requests whose completions may have been made with other weights."""
        return self._unproven

    def obey(self) -> None:
        """Ends what the server works on, if the work has to stop. Called again until all requests have come back: the
        server may learn of one after it was told to end it."""
        if not self._feed.is_stopped or not (keys := list(self._asked)):
            return
        try:
            self.server.abort(keys)
        except UnreachableError as e:
            logger.warning("%s was not told to stop: %s", self.server.url, e)

    def _fail(self, error: RolloutError) -> None:
        self.fresh, self.reason = False, str(error)
        self._feed.wake()

    def _work(self) -> None:
        while (taken := self._feed.take(ended=lambda: self._refused or not self.fresh)) is not None:
            try:
                self._ask(*taken)
            except (UnreachableError, StaleError) as e:
                self._fail(e)
            except BaseException:
                self._refused = True
                self._feed.wake()
                raise

    def _ask(self, request: Request, tries: int) -> None:
        try:
            self._made.put((request, self._completed(request)))
        except UnreachableError as e:
            if tries + 1 == _TRIES:
                raise RolloutError(f"{request.key} failed {_TRIES} times, at last: {e}") from e
            self._feed.put([request], tries=tries + 1)
            self.server.health()
        except StaleError:
            self._feed.put([request], tries=tries)
            raise

    def _completed(self, request: Request) -> Completion:
        self._asked[request.key] = request
        try:
            return self.server.complete(request)
        finally:  # before it goes back to the feed, from which another thread here may take it at once
            del self._asked[request.key]
