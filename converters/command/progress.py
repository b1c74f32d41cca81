"""Progress of a conversion: a bar on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TextIO

from megabatch.converters.command.sizes import in_words

LINE_EVERY_S, BAR_EVERY_S = 10.0, 0.2
_WIDTH = 24


class Progress:
    """Called with the bytes that are `written` or `verified`, from any thread."""

    def __init__(
        self, whole: int, out: TextIO, *, clock: Callable[[], float] = time.monotonic, every: float | None = None
    ) -> None:
        self._whole, self._out, self._clock = whole, out, clock
        self._bar = out.isatty()
        self._every = every if every is not None else BAR_EVERY_S if self._bar else LINE_EVERY_S
        self._lock = threading.Lock()
        self._what, self._done = "", 0
        self._begun = self._next = clock()
        self._shown = 0

    def __call__(self, what: str, size: int) -> None:
        with self._lock:
            now = self._clock()
            if what != self._what:
                self._what, self._done, self._begun = what, 0, now
                self._next = now + self._every
            self._done += size
            if now >= self._next:
                self._next = now + self._every
                self._show(now)

    def _show(self, now: float) -> None:
        part = min(1.0, self._done / self._whole) if self._whole else 1.0
        left = (now - self._begun) * (1 - part) / part if part else 0.0
        text = (
            f"{self._what} {100 * part:.0f} %, {in_words(self._done)} of {in_words(self._whole)}, "
            f"{_minutes(left)} left"
        )
        if not self._bar:
            print(text, file=self._out, flush=True)
            return
        filled = round(_WIDTH * part)
        line = f"[{'#' * filled}{' ' * (_WIDTH - filled)}] {text}"
        print(f"\r{line:{self._shown}}", end="", file=self._out, flush=True)
        self._shown = len(line)

    def close(self) -> None:
        """Removes the bar from the terminal."""
        with self._lock:
            if self._shown:
                print(f"\r{'':{self._shown}}\r", end="", file=self._out, flush=True)
                self._shown = 0


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
