"""Redraws a terminal repeatedly and restores it at the end."""

from __future__ import annotations

import os
import select
import shutil
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""The alternate screen without a cursor, and back."""
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class Screen:
    """A context manager. Reads single keys if standard input is a terminal; otherwise only Ctrl-C ends it."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def __enter__(self) -> Screen:
        if sys.stdin is not None and sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        self._write(_ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._write(_LEAVE)
        if self._before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def draw(self, text: str) -> None:
        """Redraws in place, without flicker; drops lines that do not fit."""
        size = shutil.get_terminal_size()
        lines = [line[: size.columns] for line in text.splitlines()]
        if len(lines) > size.lines:
            lines = [*lines[: size.lines - 1], f"… {len(lines) - size.lines + 1} more"]
        self._write(_HOME + f"{_REST_OF_LINE}\r\n".join(lines) + _REST_OF_LINE + _REST_OF_SCREEN)

    def key_within(self, seconds: float) -> str:
        """The key that was pressed, or an empty text."""
        if self._before is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else ""

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
