"""Requests that servers take one by one, and to which more may be added while they work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from megabatch.rollout.engine import Request


class Feed:
    """For any number of threads. Whoever works on a request says so when it is done (`done`) or brings it back."""

    def __init__(self, requests: Sequence[Request] = (), *, is_open: bool = False) -> None:
        """Args: is_open: more may come until `close`, and takers wait for them."""
        self._waiting: deque[tuple[Request, int]] = deque()
        self._left: set[str] = set()
        self._is_open, self._is_stopped = is_open, False
        self._changed = threading.Condition()
        self.put(requests)

    def put(self, requests: Iterable[Request], *, tries: int = 0) -> None:
        """Adds requests, or brings back those that were taken and are not done."""
        with self._changed:
            for request in requests:
                self._waiting.append((request, tries))
                self._left.add(request.key)
            self._changed.notify_all()

    def take(self, *, ended: Callable[[], bool]) -> tuple[Request, int] | None:
        """A request, and how often it was tried before; None when there is nothing more to take.

        Args: ended: whether the taker has to end; `wake` has it asked again.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._is_open or self._is_stopped or ended())
            if self._is_stopped or not self._waiting or ended():
                return None
            return self._waiting.popleft()

    def done(self, keys: Collection[str]) -> None:
        with self._changed:
            self._left -= set(keys)

    def close(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def stop(self) -> None:
        """Nothing more is taken, and what is being worked on has to end."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    @property
    def is_over(self) -> bool:
        """Whether it was stopped, or nothing is left and nothing more comes."""
        with self._changed:
            return self._is_stopped or not (self._left or self._is_open)

    @property
    def left(self) -> tuple[str, ...]:
        """Keys of the requests that are not done."""
        with self._changed:
            return tuple(self._left)
