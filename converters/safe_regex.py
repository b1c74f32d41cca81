"""Regular expressions from untrusted files, under a time limit.

A short pattern can take practically forever on a name of forty letters, and `re` cannot be stopped from another
thread. We match patterns whose form bounds their time in this process, and any other in a separate process, which we
kill when it takes too long.
"""

from __future__ import annotations

import functools
import json
import re
import re._constants as codes  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
import select
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

from megabatch.errors import ConversionError

LIMIT_S = 10.0
"""For one name, and the processor's for all names of a pattern; those that people write take a thousandth of that."""
_LONGEST = 1 << 20
"""Characters of a pattern."""
_REPEATS, _OPTIONS = 3, 7
"""Unbounded repeats of single characters, and choices, up to which matching here is quick."""
_PROGRAM = """
import json, re, sys, time
for line in sys.stdin:
    pattern, text, whole = json.loads(line)
    found = (re.fullmatch if whole else re.match)(pattern, text) is not None
    print(int(found), time.process_time(), flush=True)
"""


@functools.lru_cache(1 << 12)
def check_pattern(pattern: str) -> None:
    """Raises: ConversionError for what is no regular expression."""
    try:
        if len(pattern) > _LONGEST:
            raise ValueError(f"it has {len(pattern)} characters")
        re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ConversionError(f"{pattern[:80]!r} is not a regular expression: {error}") from error


@functools.lru_cache(1 << 18)
def matches(pattern: str, text: str, *, whole: bool = False) -> bool:
    """Whether the pattern fits the beginning of a text, or the `whole` of it.

    Raises: ConversionError for what is no regular expression, or takes too long.
    """
    check_pattern(pattern)
    if _is_quick(pattern):
        return (re.fullmatch if whole else re.match)(pattern, text) is not None
    answer = _other().ask(pattern, text, whole=whole)
    if answer is None:
        raise ConversionError(f"{pattern[:80]!r} takes longer than {LIMIT_S:g} s on {text!r}: write a simpler pattern")
    return answer


@functools.lru_cache(1 << 12)
def _is_quick(pattern: str) -> bool:
    """Whether the time that a pattern takes is a small power of a text's length, by its form."""
    repeats, options = _counted(parser.parse(pattern))
    return repeats <= _REPEATS and options <= _OPTIONS


_SINGLE = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN}
_MANY = 1000


def _counted(parsed: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
    """Unbounded repeats and choices of a parsed pattern; many, where there is anything else than single characters,
    groups, choices and repeats of single characters."""
    repeats = options = 0
    for code, value in parsed:
        if code in _SINGLE or code is codes.AT:
            continue
        if code is codes.SUBPATTERN:
            parts = [_counted(value[-1])]
        elif code is codes.BRANCH:
            options += 1
            parts = [_counted(branch) for branch in value[1]]
        elif code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, body = value
            single = len(body) == 1 and body[0][0] in _SINGLE
            if most <= 1:
                options += 1
            elif single and most != least:
                repeats += 1
            elif not single:
                return _MANY, _MANY
            parts = [_counted(body)]
        else:
            return _MANY, _MANY
        repeats += sum(part[0] for part in parts)
        options += sum(part[1] for part in parts)
    return repeats, options


class _Other:
    """A process that matches, one question at a time; started anew after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._clock = 0.0
        self._spent: dict[str, float] = {}

    def ask(self, pattern: str, text: str, *, whole: bool) -> bool | None:
        """The answer, or None when there is none in time, or the system has killed the process for its memory."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([pattern, text, whole]) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
            line = process.stdout.readline() if ready else ""
            found, _, clock = line.partition(" ")
            if line:
                self._spent[pattern] = self._spent.get(pattern, 0.0) + float(clock) - self._clock
                self._clock = float(clock)
            if line and self._spent[pattern] < LIMIT_S:
                return found == "1"
            process.kill()
            process.communicate()
            self._process = None
            return None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._clock = 0.0
            command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        return self._process


@functools.cache
def _other() -> _Other:
    return _Other()
