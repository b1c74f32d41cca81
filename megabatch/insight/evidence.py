"""What the files of a failed start say: the mark of the rank that failed first, and the lines that name a cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from megabatch.insight.causes import CAUSES, Cause
from megabatch.insight.tails import tail
from megabatch.run_directory import RunDirectory

SEARCHED_BYTES = 2**19
"""Of the end of each log."""
_ORDINARY = re.compile(r"[\d-]+ [\d:,]+ rank \d+ (INFO|DEBUG) ")
"""Most lines of a long log, in the trainer's format."""
_ELSEWHERE = re.compile(r"\brank (\d+) failed: ")
_TIME = re.compile(r"\b20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d\b")
_PATTERNS = tuple(re.compile(cause.pattern) for cause in CAUSES)
_FIRST_CONSEQUENCE = next(row for row, cause in enumerate(CAUSES) if cause.consequence)


@dataclass(frozen=True, slots=True)
class Mark:
    """What was written down of the first rank that failed."""

    rank: int
    exit_code: int
    node: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What one log says of a cause."""

    cause: Cause
    text: str
    """The line."""
    line: int | None
    """Its number, 1 first; None in a log that was not read from its beginning."""
    log: Path
    rank: int | None
    """None in a batch script's log."""


def read_mark(run: RunDirectory, job_id: str, restart: int) -> Mark | None:
    """`RANK CODE NODE`, as the batch script and the local launcher write it."""
    try:
        words = run.mark("failed", job_id, restart).read_text(encoding="utf-8").split()
        return Mark(int(words[0]), int(words[1]), words[2] if len(words) > 2 else "")
    except (OSError, ValueError, IndexError):
        return None


def findings(logs: Iterable[tuple[int | None, Path]], *, since: float = 0) -> Iterator[Finding]:
    """Of each log (a rank, or None, and its file) that names a cause, what it says.

    Args: `since`, in seconds since the epoch: lines that carry an earlier time of day belong to an earlier start.
    """
    for rank, path in logs:
        text = tail(path, SEARCHED_BYTES)
        found = search(text.decode(errors="replace"), since=since)
        if found is not None:
            cause, line, number = found
            yield Finding(cause, line, None if len(text) == SEARCHED_BYTES else number, path, rank)


def search(text: str, *, since: float = 0) -> tuple[Cause, str, int] | None:
    """The first row of the table that any line matches, the first such line, and its number."""
    best: tuple[int, str, int] | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if _ORDINARY.match(line) or (since and _is_before(line, since)):
            continue
        row = _row(line)
        if row is not None and (best is None or row < best[0]):
            best = row, line, number
    return None if best is None else (CAUSES[best[0]], best[1], best[2])


@lru_cache(maxsize=1 << 16)
def _row(line: str) -> int | None:
    """The first row that a line matches; ranks die with much the same words."""
    # what another rank is said to have failed of is not this one's failure
    first = _FIRST_CONSEQUENCE if _ELSEWHERE.search(line) else 0
    return next((row for row in range(first, len(CAUSES)) if _PATTERNS[row].search(line)), None)


def _is_before(line: str, since: float) -> bool:
    """Whether a line carries a time as Slurm writes it, in whole seconds, before `since`."""
    match = _TIME.search(line)
    return match is not None and datetime.fromisoformat(match[0]).timestamp() < int(since)


def foremost(found: Iterable[Finding]) -> Finding | None:
    """What is believed first by the order of the table; of several ranks the lowest."""
    return min(found, key=lambda one: (CAUSES.index(one.cause), -1 if one.rank is None else one.rank), default=None)
