"""Quotes any string for bash or `#SBATCH` lines."""

from __future__ import annotations

import re
import shlex

from megabatch.errors import LaunchError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_OPTION = re.compile(r"[a-z][a-z-]*")


def shell(text: str) -> str:
    """One bash word that expands to exactly `text`, always on one line.

    Raises: LaunchError for a NUL, which neither an argument nor a variable can hold.
    """
    if "\0" in text:
        raise LaunchError(f"{text!r} contains a NUL character, which a process argument cannot hold; remove it")
    if not _CONTROL.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", escaped) + "'"


def directive(option: str, value: str | int | bool) -> str:
    """A `#SBATCH --option=value` line; sbatch's own parser knows quotes and backslashes, and no escape for a newline.

    Raises: LaunchError for a control character in `value`, and for an invalid option name.
    """
    if not _OPTION.fullmatch(option):
        raise LaunchError(f"{option!r} is not the name of an sbatch option; use lower-case letters and dashes")
    if value is True:
        return f"#SBATCH --{option}"
    text = str(value)
    if _CONTROL.search(text):
        raise LaunchError(f"--{option}={text!r} contains a control character, which an #SBATCH line cannot hold")
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", text, re.ASCII):
        return f"#SBATCH --{option}={text}"
    escaped = re.sub(r"([\\\"'])", r"\\\1", text)
    return f'#SBATCH --{option}="{escaped}"'


def label(text: str) -> str:
    """`text` as a job name: control characters become spaces, since a name may not span lines."""
    return _CONTROL.sub(" ", text).strip() or "megabatch"
