"""The evidence in an attempt's files: lines of logs, the rank that failed first, the ending."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from megabatch.insight.causes import CAUSES, CONSEQUENCES, TABLE, Cause, Source
from megabatch.insight.tail import tail
from megabatch.run_directory import RunDirectory
from megabatch.values import dataclass

SEARCHED_BYTES = 2**19
"""Bytes read at the end of each rank's log."""
SCRIPT_BYTES = 2**24
"""Bytes read at the end of a batch log, which holds all attempts of its job."""
_ANY_BEGINNING = re.compile(rb"^megabatch: attempt (\d+) of job ", re.MULTILINE)
"""Starts an attempt's part of the batch log."""
_ENDED = re.compile(r"^megabatch: (rank \d+ on \S+ failed first|no rank had a word)", re.MULTILINE)
_ORDINARY = re.compile(
    r"[\d-]+ [\d:,]+ rank \d+ (INFO|DEBUG|WARNING) |(\(\S+ pid=\d+\) )?(INFO|DEBUG|WARNING) [\d-]+ [\d:]+ \["
    r"|(\[[\d: -]+\] )?\S+:\d+:\d+ \[-?\d+\] NCCL INFO "
)
"""Most lines of a long log, in the trainer's, vLLM's and NCCL's format: what a program only says did not end it."""
_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception): .*\S")
_ELSEWHERE = re.compile(r"\brank (\d+) failed: ")
_NAMES_ANOTHER = re.compile(rb"^error: rank (\d+) failed: ", re.MULTILINE)
_PREFIX = re.compile(r"^\[rank\d+\]: *")
"""torch's, before tracebacks that it prints itself."""
_PATTERNS = tuple(re.compile(row.pattern) for row in TABLE)
_FIRST_CONSEQUENCE = next(number for number, row in enumerate(TABLE) if row.cause in CONSEQUENCES)


@dataclass(frozen=True, slots=True)
class FirstFailure:
    """The record of the first rank that failed."""

    rank: int
    exit_code: int
    node: str
    """Empty if it is not known."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause named by one piece of evidence."""

    row: int
    """Of the table."""
    text: str
    """The line, or a text in its place."""
    rank: int | None = None
    """The rank that it comes from; None when it is not a single rank's."""
    log: Path | None = None
    line: int | None = None
    """Line number, from 1; None if it is not from a log, or the log was not read from its beginning."""

    @property
    def cause(self) -> Cause:
        return CAUSES[TABLE[self.row].cause]

    @property
    def consequence(self) -> bool:
        """Whether it says only that another rank failed."""
        return self.cause.name in CONSEQUENCES


def read_first_failure(run: RunDirectory, job_id: str, attempt: int) -> FirstFailure | None:
    """`RANK CODE NODE`, as the batch script and the local launcher write it."""
    try:
        words = run.marker("failed", job_id, attempt).read_text(encoding="utf-8").split()
        return FirstFailure(int(words[0]), int(words[1]), words[2] if len(words) > 2 else "")
    except (OSError, ValueError, IndexError):
        return None


def root_failure(first: FirstFailure | None, logs: Mapping[int, Path]) -> FirstFailure | None:
    """The failure that the marked rank's own log names: it may end, and be noticed, before the rank that failed."""
    if first is None or first.rank not in logs:
        return first
    named = _NAMES_ANOTHER.search(tail(logs[first.rank], SEARCHED_BYTES))
    if named is None or int(named[1]) not in logs:
        return first
    return FirstFailure(int(named[1]), first.exit_code, node="")


def of_ranks(logs: Mapping[int, Path], first: FirstFailure | None) -> Iterator[Finding]:
    """Findings from each rank's log, and the exit code of the rank that failed first."""
    for rank, path in logs.items():
        sources = (Source.FIRST, Source.RANK) if first is not None and first.rank == rank else (Source.RANK,)
        text = tail(path, SEARCHED_BYTES)
        found = search(text.decode(errors="replace"), sources)
        if found is not None:
            row, line, number = found
            yield Finding(row, line, rank, path, None if len(text) == SEARCHED_BYTES else number)
    if first is not None:
        signal = f": signal {first.exit_code - 128}" if 128 < first.exit_code <= 192 else ""
        code = f"exit code {first.exit_code}"
        yield from _stated(Source.FIRST_FAILURE, code, shown=code + signal, rank=first.rank)


def of_script(log: Path, attempt: int | None) -> Iterator[Finding]:
    """Findings from the batch log about that attempt; from the whole log if it contains no start of an attempt."""
    lines_before, text = _section(tail(log, SCRIPT_BYTES), attempt)
    found = search(_without_own_requeue(text.decode(errors="replace")), (Source.SCRIPT,))
    if found is not None:
        row, line, number = found
        yield Finding(row, line, None, log, lines_before + number)


def of_slurm(state: str, reason: str, *, shown: str) -> Iterator[Finding]:
    """Slurm's state, or the run's own records instead."""
    yield from _stated(Source.SLURM, f"{state} {reason}", shown=shown)


def of_ending(exit_code: int | None) -> Iterator[Finding]:
    """The exit code of an attempt; None when it recorded none."""
    if exit_code is None:
        lost = "it left no exit code: it was killed from outside, or its node died"
        yield from _stated(Source.ENDING, "no ending", shown=lost)
    else:
        yield from _stated(Source.ENDING, f"exit code {exit_code}", shown=f"exit code {exit_code}")


def strongest(found: Iterable[Finding], first: FirstFailure | None) -> Finding | None:
    """The finding whose row comes first in the table; among ranks the one that failed first, else the lowest."""

    def order(one: Finding) -> tuple[int, bool, int]:
        return one.row, first is None or one.rank != first.rank, -1 if one.rank is None else one.rank

    return min(found, key=order, default=None)


def search(text: str, sources: Sequence[Source]) -> tuple[int, str, int] | None:
    """The first row of the table that any line matches, the first such line, and its number."""
    best: tuple[int, str, int] | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        row = None if _ORDINARY.match(line) else _row(_PREFIX.sub("", line), tuple(sources))
        if row is not None and (best is None or row < best[0]):
            best = row, line, number
    return best


def first_error(text: str) -> str | None:
    """The first line that names an exception, from that name on; of chained tracebacks it is the root."""
    lines = (line.strip() for line in text.splitlines())
    found = (_ERROR.search(line) for line in lines if not _ORDINARY.match(line))
    return next((match[0] for match in found if match is not None), None)


@lru_cache(maxsize=1 << 16)
def _row(line: str, sources: tuple[Source, ...]) -> int | None:
    """The first row that a line matches; cached, since ranks print much the same lines."""
    # a message about another rank's failure is not this rank's failure
    first = _FIRST_CONSEQUENCE if _ELSEWHERE.search(line) else 0
    without: set[str] = set()  # patterns that the line does not match: rows of different sources share them
    for number in range(first, len(TABLE)):
        row = TABLE[number]
        if row.pattern in without or not any(source in row.sources for source in sources):
            continue
        if _PATTERNS[number].search(line):
            return number
        without.add(row.pattern)
    return None


def _stated(source: Source, text: str, *, shown: str, rank: int | None = None) -> Iterator[Finding]:
    row = _row(text, (source,))
    if row is not None:
        yield Finding(row, shown, rank)


def _without_own_requeue(text: str) -> str:
    """Drops Slurm's requeue line after the script has reported how the ranks ended: the script itself requeued."""
    ended = _ENDED.search(text)
    return text if ended is None else text[: ended.end()] + text[ended.end() :].replace("DUE TO JOB REQUEUE", "")


def _section(text: bytes, attempt: int | None) -> tuple[int, bytes]:
    """One attempt's part of a batch log, and the number of lines before it."""
    beginnings = list(_ANY_BEGINNING.finditer(text))
    if not beginnings or attempt is None:
        return 0, text
    for beginning, following in zip(beginnings, [*beginnings[1:], None], strict=True):
        if int(beginning[1]) == attempt:
            end = len(text) if following is None else following.start()
            return text.count(b"\n", 0, beginning.start()), text[beginning.start() : end]
    return 0, b""
