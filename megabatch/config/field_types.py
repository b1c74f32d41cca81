"""Types of fields: whether a value fits one, reading a value from text, and naming the type in a message."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")
_NONE = ("none", "null")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "None"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_boolean(hint: Any) -> bool:
    return bool in options(hint)


def is_list(hint: Any) -> bool:
    """Whether several values may follow the flag."""
    return any(get_origin(option) is Sequence for option in options(hint))


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal` in it."""
    return tuple(value for option in options(hint) if get_origin(option) is Literal for value in get_args(option))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the declared type; int passes for float, bool never for int, lists are stored as tuples."""
    return any(_fits_one(value, option) for option in options(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin is Sequence:
        return isinstance(value, tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if origin is Mapping:
        key, item = get_args(hint)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if hint is Any:
        return _is_json(value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def spelled(hint: Any) -> str:
    """The type in words, for messages: `a whole number or None`, `one of 'adam', 'sgd'`, `a list of text`."""
    return " or ".join(_spelled_one(option) for option in options(hint))


def _spelled_one(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if origin is Sequence:
        item = get_args(hint)[0]
        return f"a list of {_PLURALS.get(item) or spelled(item).removeprefix('one of ')}"
    if origin is Mapping:
        item = get_args(hint)[1]
        return "a mapping (JSON object)" + ("" if item is Any else f" to {_PLURALS.get(item) or spelled(item)}")
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def read(texts: Sequence[str], hint: Any) -> Any:
    """The value that a flag's texts stand for. Raises: ValueError where they fit no option of the type."""
    for option in sorted(options(hint), key=_narrowness):
        try:
            return _read_one(texts, option)
        except ValueError:
            continue
    raise ValueError(f"must be {spelled(hint)}")


def _narrowness(hint: Any) -> int:
    """Tries choices before None, and text last, so that `none` stays a choice where it is one."""
    order = (Literal, types.NoneType, bool, int, float, Mapping, Sequence)
    kind = get_origin(hint) or hint
    return order.index(kind) if kind in order else len(order)


def _read_one(texts: Sequence[str], hint: Any) -> Any:
    origin = get_origin(hint)
    if origin is Sequence:
        return _read_list(texts, get_args(hint)[0])
    if len(texts) != 1:
        raise ValueError
    text = texts[0]
    if origin is Literal:
        return _read_choice(text, get_args(hint))
    if origin is Mapping:
        return _read_mapping(text)
    readers: dict[Any, Callable[[str], Any]] = {types.NoneType: _read_none, bool: _read_bool, int: int, float: float}
    return readers.get(hint, str)(text)


def _read_list(texts: Sequence[str], item: Any) -> tuple[Any, ...]:
    """Several texts, or one JSON array; one text `none` or an empty array empties the list."""
    if len(texts) == 1 and texts[0].lstrip().startswith("["):
        texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in json.loads(texts[0])]
    return tuple(read([text], item) for text in texts)


def _read_choice(text: str, allowed: Sequence[Any]) -> Any:
    for choice in allowed:
        if text == str(choice):
            return choice
    raise ValueError


def _read_mapping(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


def _read_none(text: str) -> None:
    if text.lower() not in _NONE:
        raise ValueError


def _read_bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError
    return text.lower() in _TRUE
