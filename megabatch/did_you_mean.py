"""Suggests the nearest folder for a name that does not exist."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path


def did_you_mean(path: Path) -> str:
    """The end of a message about a missing folder: a suggestion with a similar name, or nothing."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = [child.name for child in missing.parent.iterdir() if child.is_dir()]
    except OSError:
        return ""
    near = get_close_matches(missing.name, names, n=1)
    if not near:
        return ""
    found = missing.with_name(near[0])
    whole = found / path.relative_to(missing)
    return f"; did you mean {whole if whole.exists() else found}?"
