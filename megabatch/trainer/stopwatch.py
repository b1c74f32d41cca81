"""Times of the parts of a step, without making host and device wait for each other."""

from __future__ import annotations

import time
from typing import Any

import torch

Instant = Any
"""Seconds on the host, or a CUDA event."""


class Stopwatch:
    """Records when one part ends and the next begins: in host time, or on CUDA when the device gets there."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._last: Instant = 0.0
        self._measured: list[tuple[str, Instant, Instant]] = []

    def start(self) -> None:
        """The first part begins."""
        self._last = self._now()

    def end(self, part: str) -> None:
        """A part ends, and the next one begins."""
        begin, self._last = self._last, self._now()
        self._measured.append((part, begin, self._last))

    def read(self) -> dict[str, float]:
        """Seconds by part, for the parts that the device has finished; a later reading returns the rest."""
        found: dict[str, float] = {}
        left = []
        for part, begin, end in self._measured:
            seconds = _between(begin, end)
            if seconds is None:
                left.append((part, begin, end))
            else:
                found[part] = seconds
        self._measured = left
        return found

    def _now(self) -> Instant:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Instant, end: Instant) -> float | None:
    if isinstance(end, float):
        return end - begin
    return begin.elapsed_time(end) / 1e3 if end.query() else None
