"""Numbers and truth values of rows, also where a file keeps them as text, as CSV does."""

from __future__ import annotations

import json
from typing import Any, TypeGuard

_LARGEST = 3.4028234663852886e38
"""Columns of samples are fp32, in which more is infinite."""
_TRUTH = {"true": True, "false": False}


def told(value: Any) -> Any:
    """A text that spells a number or a truth value (`True` too, as pandas writes it) as that value, and an empty one
    as None; everything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text:
        return None
    if text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, int | float) else value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that is finite in fp32; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_truth(value: Any) -> bool:
    """Whether it is true or false, or 1 or 0."""
    return isinstance(value, int | float) and value in (0, 1)
