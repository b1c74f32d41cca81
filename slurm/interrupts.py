"""Signals while jobs are handed to Slurm: none ends the launcher before the run knows of a job that sbatch queued."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from megabatch.errors import LaunchError

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, `kill`, and a terminal that is closed."""


class Interrupts:
    """The signals that came since they are held back."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first one's; None as long as there was none."""
        self.told = False
        """Whether an error says so."""
        self.spared: set[int] | None = None
        """Child processes that it is not passed on to; None: it is passed on to none."""

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        for child in _children() - self.spared if self.spared is not None else ():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Ends the body's child processes too when a signal comes."""
        self.spared = _children()
        try:
            yield
        finally:
            self.spared = None

    def error(self, folder: Path, outcome: str) -> LaunchError:
        """The error for a submission that a signal ended."""
        self.told = True
        return LaunchError(f"interrupted while {folder} was being submitted; {outcome}")

    def check(self, folder: Path) -> None:
        """Raises: LaunchError if one came."""
        if self.number is not None:
            raise self.error(folder, "it is not in the queue")


_held: list[Interrupts] = []
"""The one that is in use, if any: handlers of signals belong to the whole process."""


@contextmanager
def held_back() -> Iterator[Interrupts]:
    """Only notes the signals that would end this process, for a body that asks where it can stop without leaving
    anything behind; one that nobody asked for counts at the end. Signals that are ignored stay ignored."""
    if _held or threading.current_thread() is not threading.main_thread():
        yield _held[0] if _held else Interrupts()
        return
    noted = Interrupts()
    before = {number: signal.getsignal(number) for number in _ENDING}
    listening = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    _held.append(noted)
    try:
        for number in listening:
            signal.signal(number, noted)
        yield noted
    finally:
        for number in listening:
            signal.signal(number, before[number])
        _held.clear()
        if noted.number is not None and not noted.told:
            signal.raise_signal(noted.number)


def _children() -> set[int]:
    """Child processes of the main thread; none where the kernel does not list them, and they end by themselves."""
    try:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    except OSError:
        return set()
    return {int(pid) for pid in text.split()}
