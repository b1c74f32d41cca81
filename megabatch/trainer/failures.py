"""How a failed rank ends: what it says, and the exit code that tells the launcher whether to try again."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Iterator

from megabatch.errors import ConfigError, ConversionError, DataError, ElsewhereError, MegabatchError
from megabatch.run_directory import ExitCode

LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "NCCL communicator was aborted",
    "failed to recv",
    "recvValue failed",
    "sendBytes failed",
)
"""What gloo, NCCL and torch's store say when the other end of a connection is gone."""

_FIRST_S = 1.0
"""Lead for the rank that failed to be reported first: ranks that lose it notice within milliseconds."""


def report(error: Exception) -> ExitCode:
    """Logs why this rank ends, and returns its exit code."""
    with contextlib.suppress(OSError):  # a full disk takes the words, not the exit code
        _say(error)
    if lost_peer(error):
        time.sleep(_FIRST_S)
        return ExitCode.CRASHED
    return _code_of(error) if isinstance(error, MegabatchError) else ExitCode.CRASHED


def _say(error: Exception) -> None:
    if lost_peer(error):
        print(
            f"error: a rank that this one was talking to is gone ({_first_line(root(error))}). That is a consequence: "
            "the batch log names the rank that failed first",
            file=sys.stderr,
        )
    elif isinstance(error, MegabatchError):
        print(f"error: {error}", file=sys.stderr)  # on every rank: whichever log is looked at first tells the cause
    else:
        traceback.print_exception(error, file=sys.stderr)


def lost_peer(error: BaseException) -> bool:
    """Whether the error's root cause is that another rank is gone."""
    # torch's are RuntimeErrors; a hub or a disk that says the same raises an OSError
    said = [str(e) for e in _chain(error) if isinstance(e, RuntimeError)]
    return any(sign in text for sign in LOST_PEER for text in said)


def root(error: BaseException) -> BaseException:
    """The exception at the root of the chain."""
    *_, first = _chain(error)
    return first


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _code_of(error: MegabatchError) -> ExitCode:
    cause = error.error if isinstance(error, ElsewhereError) else error
    return ExitCode.CONFIG if isinstance(cause, ConfigError | DataError | ConversionError) else ExitCode.FAILED


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
