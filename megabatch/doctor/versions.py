"""Comparing version numbers with ranges such as `>=0.16.1,<0.20`, without the packaging library."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<": operator.lt,
    "==": operator.eq,
}


def supports(range_: str, version: str) -> bool:
    """Whether a version lies in a range of `>=`, `<` and `==`; local and pre-release parts do not count."""
    for part in filter(None, range_.split(",")):
        match = re.fullmatch(r"(>=|<|==)([\d.]+)", part.strip())
        assert match, f"range {range_!r}"
        have, want = _release(version), _release(match[2])
        width = max(len(have), len(want))
        if not _COMPARE[match[1]](_padded(have, width), _padded(want, width)):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _padded(release: tuple[int, ...], width: int) -> tuple[int, ...]:
    return release + (0,) * (width - len(release))
