"""Error handling shared by all command lines: errors in one line, and readers that leave early."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence

from megabatch.errors import ConfigError, ConversionError, DataError, MegabatchError
from megabatch.run_directory import ExitCode

_NAMES = {
    errno.ENAMETOOLONG: "is too long: a name has at most 255 bytes, a path 4,095; choose a shorter one",
    errno.ELOOP: "is a link that leads back to itself; choose another",
}
"""OS errors that mean that the file's name is wrong."""
_SHOWN = 80


def run_command(work: Callable[[], int], arguments: Sequence[str]) -> int:
    """Does the work and returns its exit code; an error is printed in one line and gives the code that fits it.

    What the terminal's encoding lacks is printed escaped. When the reader of standard output goes away (`| head`), we
    print nothing more, not even at exit.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _require_text(arguments)
        try:
            code = work()
        except SystemExit as end:  # argparse's help and version
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        return code
    except MegabatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _NAMES:
            raise
        name = str(error.filename)
        print(f"error: {name[:_SHOWN]}{'…' * (len(name) > _SHOWN)} {_NAMES[error.errno]}", file=sys.stderr)
        return ExitCode.CONFIG


def exit_code(error: MegabatchError) -> ExitCode:
    """Errors that the same command would hit again count as faults of the configuration."""
    return ExitCode.CONFIG if isinstance(error, ConfigError | DataError | ConversionError) else ExitCode.FAILED


def _require_text(arguments: Sequence[str]) -> None:
    """Raises: ConfigError for bytes that are not valid text: neither run.json nor a log could name such a path."""
    for name, text in (*(("argument", word) for word in arguments), ("current folder", os.getcwd())):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{name} {text!a} holds bytes that are not UTF-8; rename it") from error
