"""The servers of teachers as a recipe names them: one for all rows, or each for rows with tags of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Served:
    """One teacher behind a server."""

    url: str
    """http://host:port, or role:NAME."""
    tags: tuple[str, ...] = ()
    """Of the rows that it teaches; empty for a single teacher, which teaches all."""


def served_teachers(named: str) -> list[Served]:
    """The teachers in `teacher_model_server`: an address, or JSON as ms-swift's, `[{"url": …, "tags": […]}, …]`.

    Raises: ValueError saying what is wrong, as a rule.
    """
    if not named.lstrip().startswith("["):
        if "," in named:
            raise ValueError('names several teachers; write [{"url": …, "tags": […]}, …]')
        return [Served(named.strip())]
    try:
        entries = json.loads(named)
    except ValueError as e:
        raise ValueError(f"is not JSON: {e}") from e
    found = [_served(entry) for entry in entries]
    twice = [tag for tag, count in Counter(tag for one in found for tag in one.tags).items() if count > 1]
    if twice:
        raise ValueError(f"gives the tag {twice[0]!r} to two teachers, and a row has one")
    if not found:
        raise ValueError("names no teacher")
    return found


def teacher_tags(named: str | None) -> Sequence[tuple[str, int]]:
    """Each tag with the number of its teacher; nothing where one teaches all rows. Raises: as `served_teachers`."""
    found = [] if named is None else served_teachers(named)
    return tuple((tag, number) for number, one in enumerate(found) for tag in one.tags)


def _served(entry: object) -> Served:
    form = '{"url": "http://host:port", "tags": ["name", …]}'
    if not isinstance(entry, dict) or set(entry) != {"url", "tags"}:
        raise ValueError(f"must have entries of the form {form}, and has {json.dumps(entry)}")
    url, tags = entry["url"], entry["tags"]
    if not isinstance(url, str) or not isinstance(tags, list) or not tags:
        raise ValueError(f"must have entries of the form {form}, and has {json.dumps(entry)}")
    return Served(url, tuple(str(tag) for tag in tags))
