"""JSON as it was meant: an object with a key twice is refused, where Python's own reader keeps the last silently."""

from __future__ import annotations

import json
from typing import Any


class JsonError(ValueError):
    """The text is not valid JSON; the message says what and where, as the inside of a sentence."""


def loads(text: str) -> Any:
    """The value of a JSON text. Raises: JsonError, also for too deep a nesting and a number of too many digits."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as e:
        raise JsonError(f"{e.msg} at column {e.colno}{_near(text, e)}") from e
    except RecursionError as e:
        raise JsonError("nested too deeply") from e
    except JsonError:
        raise
    except ValueError as e:  # of int(), for more than 4,300 digits
        raise JsonError("a number has too many digits") from e


def _near(text: str, error: json.JSONDecodeError) -> str:
    """Where it is in a text of several lines."""
    if error.lineno == 1:
        return ""
    return f" of line {error.lineno}, near {text[max(0, error.pos - 20) : error.pos + 20]!r}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise JsonError(f"the key {twice!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
