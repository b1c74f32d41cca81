"""Errors that a user's own code raised, in a recipe or a callback, with the line of its file."""

from __future__ import annotations

from pathlib import Path

NO_EXIT = "; it may not end the program: return or define what is asked for (megabatch reads the command line itself)"
"""Behind a `SystemExit` of a recipe or of another file of the user's."""


def describe_error(error: BaseException, file: Path) -> str:
    """The last line of the file's own code in the traceback, and where the error was raised if that is elsewhere."""
    from traceback import extract_tb

    place, last = place_in(error, file), extract_tb(error.__traceback__)[-1]
    deepest = f"{Path(last.filename).name}:{last.lineno}"
    beneath = "" if deepest == place or last.filename.startswith("<") else f" (at {deepest})"
    said = " ".join(str(error).split()) or last.line or ""
    return f"{place}: {type(error).__name__}: {said}{beneath}"


def place_in(error: BaseException, file: Path) -> str:
    """`file:line` of the last frame in the recipe's own code."""
    from traceback import extract_tb

    own = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).absolute() == file.absolute()]
    return f"{file.name}:{own[-1].lineno}" if own else file.name
