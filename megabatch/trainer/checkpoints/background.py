"""One rank's part of a checkpoint, written beside training by a thread of the rank.

The thread works on copies: it touches no process group and nothing that training changes. megatron-core's own
asynchronous save forks a process beside gloo's threads (0.16) or needs another package (0.19), and copies nothing on a
CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from megabatch.errors import CheckpointError, MegabatchError

T = TypeVar("T")


class Background(Generic[T]):
    """Starts `write` immediately in a daemon thread."""

    def __init__(self, write: Callable[[], T]) -> None:
        self._write = write
        self._written: T | None = None
        self._error: MegabatchError | None = None
        self._thread = threading.Thread(target=self._run, name="megabatch-checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._written = self._write()
        except MegabatchError as e:
            self._error = e
        except Exception as e:  # disk errors arrive as OSError or, from torch, as RuntimeError
            self._error = CheckpointError(f"{type(e).__name__}: {e}")

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> tuple[T | None, MegabatchError | None]:
        """Waits for the thread, then returns what `write` returned, or its error."""
        self._thread.join()
        return self._written, self._error
