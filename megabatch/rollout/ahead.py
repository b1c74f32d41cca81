"""Conversations that an engine works on while its user does something else, over any number of updates of its weights.

An update ends what is being generated; then each completion goes on behind the tokens that it has, with the new
weights. No token is lost or drawn twice, and each keeps the version of the policy that drew it. Environments answer
whenever a turn is done, whatever the engine does.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megabatch.errors import RolloutError
from megabatch.rollout.engine import Completion, Request, UnservedError
from megabatch.rollout.feed import Feed
from megabatch.rollout.turns.conversations import Conversation, Partner, next_turn, take_answer, take_turn

Stream = Callable[[Feed], Iterator[list[Completion]]]
"""Yields completions as they come, until the feed is over. Once it is stopped, what is not done comes back as
`aborted`. Raises: UnservedError, RolloutError."""


@dataclass(kw_only=True)
class _Flight:
    """One conversation, its turn in as many parts as it was interrupted."""

    conversation: Conversation
    partner: Partner | None
    """What answers it; None where one turn is all."""
    turn: Request
    """What is asked of the engine."""
    parts: list[Completion] = field(default_factory=list)
    """Of the turn."""
    is_answered: bool = False
    """Whether the engine waits for the partner."""
    error: RolloutError | None = None
    """Of the partner."""

    @property
    def is_done(self) -> bool:
        return self.conversation.finish is not None

    @property
    def is_asked(self) -> bool:
        """Whether it is the engine's turn."""
        return not (self.is_done or self.is_answered or self.error)

    def rest(self) -> Request:
        """What is left to generate of the turn; the seed of a part follows from where it begins."""
        ids = tuple(token for part in self.parts for token in part.ids)
        if not ids:
            return self.turn
        digest = hashlib.blake2b(f"{self.turn.seed}+{len(ids)}".encode(), digest_size=7).digest()
        return replace(
            self.turn,
            prompt=(*self.turn.prompt, *ids),
            sampling=replace(self.turn.sampling, max_tokens=self.turn.sampling.max_tokens - len(ids)),
            seed=int.from_bytes(digest, "little"),
        )

    def land(self) -> None:
        """Ends the turn with the parts that it has."""
        whole = Completion(
            key=self.turn.key,
            ids=tuple(token for part in self.parts for token in part.ids),
            logps=tuple(logp for part in self.parts for logp in part.logps),
            versions=tuple(version for part in self.parts for version in part.versions),
            finish=self.parts[-1].finish,
        )
        take_turn(self.conversation, whole)
        self.parts = []
        if self.partner is None:
            self.conversation.finish = whole.finish


class Ahead:
    """Held at first: nothing is generated before `go_on`. All methods are for one thread."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._flights: dict[str, _Flight] = {}
        self._changed = threading.Condition()
        """Guards the flights, the feed and the error."""
        self._feed: Feed | None = None
        """What the engine takes; None where it is held."""
        self._worker: threading.Thread | None = None
        self._error: RolloutError | None = None

    def begin(self, requests: Sequence[Request], partner: Partner | None = None) -> None:
        """Adds conversations; those that it has already go on as they are. Held afterwards if any was new."""
        if new := [request for request in requests if request.key not in self._flights]:
            self.hold()
            for request in new:
                one = Conversation(request=request)
                self._flights[request.key] = _Flight(conversation=one, partner=partner, turn=request)

    def go_on(self) -> None:
        """Generates what is not done, unless it does already."""
        with self._changed:
            if self._worker is not None or all(flight.is_done for flight in self._flights.values()):
                return
            self._error = None
            left = [flight.rest() for flight in self._flights.values() if flight.is_asked]
            self._feed = feed = Feed(left, is_open=True)
        self._worker = threading.Thread(target=self._work, args=(feed,), name="megabatch-ahead", daemon=True)
        self._worker.start()

    def hold(self) -> None:
        """Ends what is being generated; returns once the engine works on nothing, and all it has made is here.
        Environments that are asked go on."""
        if self._worker is not None:
            with self._changed:
                if self._feed is not None:
                    self._feed.stop()
            self._worker.join()
            self._worker = None

    def take(self, keys: Sequence[str]) -> list[Conversation]:
        """Waits for these conversations, and hands them out for good. Keep it going until then.

        Raises: UnservedError when no server is left, and the engine needs the weights again: hold, update, go on and
        take again; RolloutError for what no update cures.
        """
        wanted = [self._flights[key] for key in keys]
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error is not None
                    or any(flight.error is not None for flight in wanted)
                    or all(flight.is_done for flight in wanted)
                )
            )
            for error in (*(flight.error for flight in wanted), self._error):
                if error is not None and not all(flight.is_done for flight in wanted):
                    raise error
            for key in keys:
                del self._flights[key]
        return [flight.conversation for flight in wanted]

    @property
    def unfinished(self) -> int:
        """Conversations that were begun and are not done."""
        with self._changed:
            return sum(not flight.is_done for flight in self._flights.values())

    @property
    def landed(self) -> int:
        """Conversations that are done and were not taken."""
        return len(self._flights) - self.unfinished

    def _work(self, feed: Feed) -> None:
        """Until all is done, or the feed is stopped."""
        error: RolloutError | None = None
        interrupted = 0
        try:
            for some in self._stream(feed):
                with self._changed:
                    stopped = feed.is_stopped
                    for one in some:
                        interrupted += self._land(one, feed) and not stopped
                    self._close_if_done(feed)
                    self._changed.notify_all()
                if interrupted and not stopped:
                    error = UnservedError(f"{interrupted} completions were ended by another user of the servers", ())
                    feed.stop()
        except RolloutError as e:
            error = error or e
        except Exception as e:  # a thread's exception would only be printed, and `take` would wait for ever
            error = RolloutError(f"generating ahead failed: {type(e).__name__}: {e}")
        with self._changed:
            self._feed, self._error = None, error
            self._changed.notify_all()

    def _land(self, one: Completion, feed: Feed) -> bool:
        """Takes what the engine made. Returns: whether it was interrupted."""
        flight = self._flights[one.key.partition("@")[0]]
        if one.ids or one.finish != "aborted":
            flight.parts.append(one)
        if one.finish == "aborted":
            return True
        flight.land()
        if not flight.is_done:
            flight.is_answered = True
            threading.Thread(
                target=self._answer, args=(flight,), name=f"megabatch-answer-{one.key}", daemon=True
            ).start()
        return False

    def _answer(self, flight: _Flight) -> None:
        """Asks the partner, and the engine for the next turn."""
        assert flight.partner is not None
        one, limits = flight.conversation, flight.partner.limits
        error: RolloutError | None = None
        try:
            found = flight.partner.answer(one)
        except RolloutError as e:
            error = e
        except Exception as e:  # as in `_work`
            error = RolloutError(f"answering {one.key} failed: {type(e).__name__}: {e}")
        with self._changed:
            flight.is_answered, flight.error = False, error
            if error is None:
                take_answer(one, found, limits)
            if flight.is_asked:
                flight.turn = next_turn(one, limits)
            if self._feed is not None:
                if flight.is_asked:
                    self._feed.put([flight.rest()])
                self._close_if_done(self._feed)
            self._changed.notify_all()

    def _close_if_done(self, feed: Feed) -> None:
        if all(flight.is_done or flight.error for flight in self._flights.values()):
            feed.close()
