"""Work that any number of threads share: each takes the next piece when it is done with one, or brings it back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece(Generic[S]):
    number: int
    item: S
    failing_since: float | None = None
    """`time.monotonic()` when it was brought back first."""


class SharedWork(Generic[S, T]):
    def __init__(self, items: Sequence[S]) -> None:
        self._waiting = deque(Piece(number, item) for number, item in enumerate(items))
        self._results: dict[int, T] = {}
        self._count, self._is_ended = len(items), False
        self._changed = threading.Condition()

    def take(self) -> Piece[S] | None:
        """The next piece, which another thread may bring back later; None when the work is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over)
            return None if self._is_over else self._waiting.popleft()

    def done(self, piece: Piece[S], result: T) -> None:
        with self._changed:
            self._results[piece.number] = result
            self._changed.notify_all()

    def put_back(self, piece: Piece[S]) -> None:
        with self._changed:
            self._waiting.append(piece)
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more is taken."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def is_over_within(self, seconds: float) -> bool:
        """Waits as long for all to be done, or the end."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over, seconds)

    @property
    def is_done(self) -> bool:
        with self._changed:
            return len(self._results) == self._count

    @property
    def results(self) -> list[T]:
        """In the order of the items, once all are done."""
        return [self._results[number] for number in range(self._count)]

    @property
    def _is_over(self) -> bool:
        return self._is_ended or len(self._results) == self._count
