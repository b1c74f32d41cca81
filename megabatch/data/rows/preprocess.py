"""`data.preprocess`: a user's own function, from a row of a dataset to the rows that are trained on.

def tidy(row):                                   # the columns of the file, before `data.columns` renames them
    if row["score"] < 3:
        return None                              # the row is dropped, and counted
    return {"query": row["q"], "response": row["a"].strip()}         # or a list of rows
"""

from __future__ import annotations

import copy
import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from megabatch.data.rows.files import Row, content_digest
from megabatch.errors import ConfigError, DataError
from megabatch.user_code import load_named, location, split
from megabatch.user_error import describe_error

EXAMPLE = "my_rows.py:tidy"
DROPPED = "dropped by data.preprocess"
_AGAIN_S = 1.0
"""The limit strikes again after so long, where the function catches whatever it raises."""


class Settings(Protocol):
    """`Data`, or `Encoding`."""

    @property
    def preprocess(self) -> str | None: ...
    @property
    def preprocess_timeout_s(self) -> float: ...


class Preprocess:
    """The function, loaded in the process that calls it."""

    def __init__(self, text: str, *, timeout_s: float) -> None:
        """Raises: ConfigError with the line, where the function cannot be loaded or called with one row."""
        self._function, self._file = load_named(text, kind="function", example=EXAMPLE)
        self._name, self._timeout_s = split(text)[1], timeout_s
        if isinstance(self._function, type):
            raise ConfigError(f"{self._name} is a class; give a function that takes a row")
        try:
            inspect.signature(self._function).bind({})
        except TypeError as error:
            raise ConfigError(f"{self._name} must take one argument, the row ({error})") from error

    def __call__(self, row: Row) -> list[Row]:
        """The rows that are made of a row, in its place; none if it is dropped.

        Raises: DataError with the row's place and the function's line, if it raises, takes too long, or returns
        anything else.
        """
        try:
            with _limited(self._timeout_s):
                made = self._function(copy.deepcopy(row.fields))  # a row that is drawn twice must stay what it is
        except _TooLong as late:
            place = _line_in(late, self._file)
            raise DataError(
                f"{row.origin}: data.preprocess {self._name} took longer than preprocess_timeout_s="
                f"{self._timeout_s:g}, at {place}; raise the limit, or mend the function"
            ) from None
        except Exception as error:
            where = describe_error(error, self._file)
            raise DataError(f"{row.origin}: data.preprocess {self._name} failed at {where}") from error
        made = [] if made is None else [made] if isinstance(made, dict) else made
        if not isinstance(made, list) or not all(_is_row(one) for one in made):
            raise DataError(
                f"{row.origin}: data.preprocess {self._name} returned {_kind(made)}; it must return a row (a dict "
                "with texts as keys), a list of rows, or None to drop the row"
            )
        return [Row(row.origin, one) for one in made]


def preprocess_of(settings: Settings) -> Preprocess | None:
    """The function of a recipe's data, or none. Raises: ConfigError."""
    if settings.preprocess is None:
        return None
    return Preprocess(settings.preprocess, timeout_s=settings.preprocess_timeout_s)


def source_of(text: str) -> tuple[str, str]:
    """The function's name and a digest of its file: what the rows depend on, wherever the file is."""
    return split(text)[1], content_digest(location(text)).hex()


class _TooLong(BaseException):
    """Not an Exception, which the function might catch."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupts the block after so long; only in a process's main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def strike(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _line_in(late: _TooLong, file: Path) -> str:
    """`file:line` where the function's own file was."""
    from traceback import walk_tb

    lines = [line for frame, line in walk_tb(late.__traceback__) if Path(frame.f_code.co_filename) == file]
    return f"{file.name}:{lines[-1]}" if lines else file.name


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _kind(made: Any) -> str:
    if isinstance(made, list):
        odd = next(one for one in made if not _is_row(one))
        return f"a list with {_kind(odd)}"
    return "a dict with keys that are no texts" if isinstance(made, dict) else f"a value of type {type(made).__name__}"
