"""Completions that an engine works on while its user does something else, over any number of updates of its weights.

An update ends what is being generated; then each completion goes on behind the tokens that it has, with the new
weights. No token is lost or drawn twice, and each keeps the version of the policy that drew it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megabatch.errors import RolloutError
from megabatch.rollout.engine import Completion, Request, UnservedError

Stream = Callable[[Sequence[Request], threading.Event], Iterator[list[Completion]]]
"""Yields completions as they come. Once the event is set, what is not done comes back as `aborted`. Raises:
UnservedError, RolloutError."""


@dataclass(kw_only=True)
class _Flight:
    """One completion, in as many parts as it was interrupted."""

    request: Request
    parts: list[Completion] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts)

    @property
    def is_done(self) -> bool:
        return bool(self.parts) and self.parts[-1].finish != "aborted"

    def rest(self) -> Request:
        """What is left to generate; the seed of a part follows from where it begins."""
        if not (drawn := self.tokens):
            return self.request
        digest = hashlib.blake2b(f"{self.request.seed}+{drawn}".encode(), digest_size=7).digest()
        ids = tuple(token for part in self.parts for token in part.ids)
        return replace(
            self.request,
            prompt=(*self.request.prompt, *ids),
            sampling=replace(self.request.sampling, max_tokens=self.request.sampling.max_tokens - drawn),
            seed=int.from_bytes(digest, "little"),
        )

    def whole(self) -> Completion:
        return Completion(
            key=self.request.key,
            ids=tuple(token for part in self.parts for token in part.ids),
            logps=tuple(logp for part in self.parts for logp in part.logps),
            versions=tuple(version for part in self.parts for version in part.versions),
            finish=self.parts[-1].finish,
        )


class Ahead:
    """Held at first: nothing is generated before `go_on`. All methods are for one thread."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._flights: dict[str, _Flight] = {}
        self._changed = threading.Condition()
        """Guards the flights and the error."""
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._error: RolloutError | None = None

    def begin(self, requests: Sequence[Request]) -> None:
        """Adds requests; those that it has already go on as they are. Held afterwards if any was new."""
        if new := [request for request in requests if request.key not in self._flights]:
            self.hold()
            self._flights |= {request.key: _Flight(request=request) for request in new}

    def go_on(self) -> None:
        """Generates what is not done, unless it does already."""
        left = [flight.rest() for flight in self._flights.values() if not flight.is_done]
        if self._worker is not None or not left:
            return
        self._error = None
        self._stop.clear()
        self._worker = threading.Thread(target=self._work, args=(left,), name="megabatch-ahead", daemon=True)
        self._worker.start()

    def hold(self) -> None:
        """Ends what is being generated; returns once the engine works on nothing, and all it has made is here."""
        if self._worker is not None:
            self._stop.set()
            self._worker.join()
            self._worker = None

    def take(self, keys: Sequence[str]) -> list[Completion]:
        """Waits for these completions, and hands them out for good. Keep it going until then.

        Raises: UnservedError when no server is left, and the engine needs the weights again: hold, update, go on and
        take again; RolloutError for what no update cures.
        """
        wanted = [self._flights[key] for key in keys]
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or all(flight.is_done for flight in wanted))
            if not all(flight.is_done for flight in wanted):
                assert self._error is not None
                raise self._error
            for key in keys:
                del self._flights[key]
        return [flight.whole() for flight in wanted]

    @property
    def unfinished(self) -> int:
        """Completions that were begun and are not done."""
        with self._changed:
            return sum(not flight.is_done for flight in self._flights.values())

    @property
    def landed(self) -> int:
        """Completions that are done and were not taken."""
        return len(self._flights) - self.unfinished

    def _work(self, requests: Sequence[Request]) -> None:
        """All that is not done: nothing is added while this goes on."""
        error: RolloutError | None = None
        try:
            for some in self._stream(requests, self._stop):
                with self._changed:
                    for one in some:
                        if one.ids or one.finish != "aborted":
                            self._flights[one.key].parts.append(one)
                    self._changed.notify_all()
        except RolloutError as e:
            error = e
        except Exception as e:  # a thread's exception would only be printed, and `take` would wait for ever
            error = RolloutError(f"generating ahead failed: {type(e).__name__}: {e}")
        with self._changed:
            left = sum(not flight.is_done for flight in self._flights.values())
            if error is None and left and not self._stop.is_set():
                error = UnservedError(f"{left} completions were ended by another user of the servers", ())
            self._error = error
            self._changed.notify_all()
