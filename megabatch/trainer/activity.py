"""Logs what a rank is doing when it receives SIGUSR1: every thread's stack, phase and step.

A signal handler in C writes the stacks, so it works while the main thread hangs in a collective, and while a call
holds Python's lock and nothing else can run. Then the line with the phase is missing, which tells you so.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time

ASK = signal.SIGUSR1


class Activity:
    """The loop keeps it up to date, at two assignments per phase; we read it only on request."""

    def __init__(self, rank: int) -> None:
        self.rank, self.phase, self.step = rank, "starting", 0
        self._since = time.monotonic()

    def at(self, phase: str, step: int) -> None:
        """Step `step` is in `phase` from now on."""
        self.phase, self.step, self._since = phase, step, time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self._since
        return f"rank {self.rank} is at step {self.step}, {self.phase}, for {seconds:.0f} s"

    def listen(self) -> None:
        """Starts answering the signal; call it in the main thread, once per process."""
        # Python's own handler does nothing but wake the thread below, which needs no help of the main thread
        signal.signal(ASK, lambda number, frame: None)
        faulthandler.register(ASK, all_threads=True, chain=True)
        heard, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(heard,), name="activity", daemon=True).start()

    def _answer(self, heard: int) -> None:
        while True:
            if ASK in os.read(heard, 64):
                print(self, file=sys.stderr, flush=True)
