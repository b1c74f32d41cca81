"""Reading the logs of a run: one file for each rank and attempt, and one for each job's batch script."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.state import status

_NAME = re.compile(r"rank_(\d+)\.(\d+)\.log")
_POLL_S = 0.5
_STATE_EVERY_S = 3.0


@dataclass(frozen=True, slots=True, order=True)
class RankLog:
    """One rank's log of one attempt; logs sort by attempt, then rank."""

    attempt: int
    rank: int
    path: Path


def rank_logs(run: Path) -> list[RankLog]:
    """Every rank log, oldest attempt first."""
    found = []
    for path in RunDirectory(run).logs.glob("rank_*.log"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append(RankLog(int(match[2]), int(match[1]), path))
    return sorted(found)


def batch_logs(run: Path) -> list[Path]:
    """The batch scripts' logs, oldest job first."""
    return sorted(RunDirectory(run).logs.glob("batch.*.log"), key=lambda path: path.stat().st_mtime)


def logs(run: Path, *, rank: int | None = 0, attempt: int | None = None, follow: bool = False) -> Iterator[str]:
    """Lines of a log, without their newlines.

    Args: `rank` None is the batch script; `attempt` None is the newest; `follow` waits for more lines, continues with
    the next attempt, and ends with the run.
    Raises: LaunchError at the first line when there is no such log; it lists the existing logs.
    """
    path = _find(run, rank=rank, attempt=attempt)
    if path is None and not follow:
        raise LaunchError(_missing(run, rank=rank, attempt=attempt))
    if not follow:
        assert path is not None
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (line.rstrip("\n") for line in file)
        return
    yield from _follow(run, rank=rank, attempt=attempt)


def _find(run: Path, *, rank: int | None, attempt: int | None) -> Path | None:
    if rank is None:
        batches = batch_logs(run)
        return batches[-1] if batches else None
    fitting = [log for log in rank_logs(run) if log.rank == rank and attempt in (None, log.attempt)]
    return fitting[-1].path if fitting else None


def _missing(run: Path, *, rank: int | None, attempt: int | None) -> str:
    there = [f"{log.rank}.{log.attempt}" for log in rank_logs(run)[-8:]]
    wanted = (
        "the batch script" if rank is None else f"rank {rank}" + ("" if attempt is None else f", attempt {attempt}")
    )
    state = status([run])[0].state
    hint = f"; newest <rank>.<attempt> there: {', '.join(there)}" if there else "; no rank has written one yet"
    return f"{run}: no log of {wanted} (the run is {state}){hint}"


def _follow(run: Path, *, rank: int | None, attempt: int | None) -> Iterator[str]:
    path: Path | None = None
    position, rest, ended, asked = 0, b"", False, 0.0
    while True:
        newest = _find(run, rank=rank, attempt=attempt)
        chunk = _read_from(path, position) if path is not None else b""
        position += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
        if chunk:
            continue
        if newest != path:
            if rest:
                yield rest.decode(errors="replace")
            path, position, rest = newest, 0, b""
        elif ended:
            if rest:
                yield rest.decode(errors="replace")
            return
        elif time.monotonic() - asked > _STATE_EVERY_S:
            asked = time.monotonic()
            ended = not status([run])[0].state.active
        else:
            time.sleep(_POLL_S)


def _read_from(path: Path, position: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(position)
        return file.read()
