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
_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE),
}
"""OS errors that say what this machine does not give, whose traceback would say no more."""
_LIMITS = {
    errno.EAGAIN: "another process (ulimit -u)",
    errno.ENOMEM: "more memory (ulimit -v)",
}
"""OS errors of processes and threads that cannot be started, and what is lacking."""
_NO_THREAD = "can't start new thread"
_SHOWN = 80


def run_command(work: Callable[[], int], arguments: Sequence[str]) -> int:
    """Does the work and returns its exit code; an error is printed in one line and gives the code that fits it.

    What the terminal's encoding lacks is printed escaped. When the reader of standard output goes away (`| head`), we
    print nothing more, not even at exit.
    """
    open_streams()
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
        discard_output()
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _NAMES and error.errno not in _MACHINE and error.errno not in _LIMITS:
            raise
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return ExitCode.CONFIG if error.errno in _NAMES else ExitCode.FAILED
    except RuntimeError as error:
        if _NO_THREAD not in str(error):
            raise
        print(f"error: {_in_words(OSError(errno.EAGAIN, str(error)))}", file=sys.stderr)
        return ExitCode.FAILED


def open_streams() -> None:
    """Lets standard streams that are closed (`>&-`) lead nowhere: the next file to be opened would get a closed one's
    number, and with it what our child processes print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r+")  # noqa: SIM115
            if stream.fileno() == number:
                os.set_inheritable(number, True)
            setattr(sys, name, stream)


def discard_output() -> None:
    """Lets standard output lead nowhere, so that Python does not fail again where it writes the rest of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_words(error: OSError) -> str:
    if error.errno in _LIMITS:
        return f"this machine or account does not give {_LIMITS[error.errno]}: {error.strerror}"
    if error.filename is not None:
        name = str(error.filename)
        return f"{name[:_SHOWN]}{'…' * (len(name) > _SHOWN)} {_NAMES.get(error.errno or 0, error.strerror)}"
    discard_output()
    return f"standard output or a file cannot be written: {error.strerror}"


def exit_code(error: MegabatchError) -> ExitCode:
    """Errors that the same command would hit again count as faults of the configuration."""
    return ExitCode.CONFIG if isinstance(error, ConfigError | DataError | ConversionError) else ExitCode.FAILED


def _require_text(arguments: Sequence[str]) -> None:
    """Raises: ConfigError for bytes that are not valid text: neither run.json nor a log could name such a path."""
    reads_utf8 = sys.getfilesystemencoding() == "utf-8"
    for name, text in (*(("argument", word) for word in arguments), ("current folder", current_folder())):
        if not (reads_utf8 or text.isascii()):
            raise ConfigError(_other_encoding(f"{name} {text!a}"))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{name} {text!a} holds bytes that are not UTF-8; rename it") from error


def _other_encoding(what: str) -> str:
    encoding = sys.getfilesystemencoding()
    return f"{what} is read as {encoding} here, but as UTF-8 by the ranks; unset PYTHONUTF8 and export LC_ALL=C.UTF-8"


def current_folder() -> str:
    """Raises: ConfigError if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder does not exist any more; go to another one (cd)") from error
