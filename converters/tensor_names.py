"""What the name of a tensor in a file may not hold."""

from __future__ import annotations

import re

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def require_plain(name: str) -> str:
    """The name. Raises: ValueError for one that would break an error's line, or control the terminal that shows it."""
    if _CONTROLS.search(name):
        raise ValueError(f"the name {name!r} has control characters")
    return name
