"""Teachers as a recipe names them: one for all rows, or each for the rows with tags of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from megabatch.values import dataclass

Kind = Literal["url", "model"]
_FORMS = {
    "url": '{"url": "http://host:port", "tags": ["name", …]}',
    "model": '{"model": "folder or hub name", "tags": ["name", …]}',
}
"""An entry of several teachers: behind servers (`teacher_model_server`), or in the ranks (`teacher_model`)."""


@dataclass(frozen=True, slots=True)
class Named:
    """One teacher."""

    where: str
    """http://host:port or role:NAME, those of several servers with commas between them; folder or hub name of a
    model."""
    tags: tuple[str, ...] = ()
    """Of the rows that it teaches; empty for a single teacher, which teaches all."""


def teachers_named(text: str, kind: Kind) -> list[Named]:
    """The teachers in `teacher_model_server` or `teacher_model`: one, or JSON as ms-swift's,
    `[{"url": …, "tags": […]}, …]`, in the ranks with `model` for `url`.

    Raises: ValueError saying what is wrong, as a rule.
    """
    if not are_several(text):
        return [Named(text.strip() if kind == "url" else text)]
    try:
        entries = json.loads(text)
    except ValueError as e:
        raise ValueError(f"is not JSON: {e}") from e
    found = [_named(entry, kind) for entry in entries]
    twice = [tag for tag, count in Counter(tag for one in found for tag in one.tags).items() if count > 1]
    if twice:
        raise ValueError(f"gives the tag {twice[0]!r} to two teachers, and a row has one")
    if not found:
        raise ValueError("names no teacher")
    return found


def are_several(text: str | None) -> bool:
    """Whether it is the form for several teachers."""
    return text is not None and text.lstrip().startswith("[")


def teacher_tags(*, server: str | None, model: str | None) -> Sequence[tuple[str, int]]:
    """Each tag with the number of its teacher; nothing where one teaches all rows.

    Args: `teacher_model_server` and `teacher_model`. Raises: as `teachers_named`.
    """
    found = teachers_named(server, "url") if server is not None else teachers_named(model, "model") if model else []
    return tuple((tag, number) for number, one in enumerate(found) for tag in one.tags)


def models_named(text: str | None) -> list[str]:
    """The models in `teacher_model`; none where it is None, or what a rule refuses."""
    if text is None:
        return []
    try:
        return [one.where for one in teachers_named(text, "model")]
    except ValueError:
        return []


def each_model(text: str, change: Callable[[str], str]) -> str:
    """`teacher_model` with each of its models changed."""
    if not are_several(text):
        return change(text)
    try:
        found = teachers_named(text, "model")
    except ValueError:
        return text  # a rule refuses it
    return json.dumps([{"model": change(one.where), "tags": list(one.tags)} for one in found], ensure_ascii=False)


def _named(entry: object, kind: Kind) -> Named:
    form = _FORMS[kind]
    if not isinstance(entry, dict) or set(entry) != {kind, "tags"}:
        raise ValueError(f"must have entries of the form {form}, and has {json.dumps(entry)}")
    where, tags = entry[kind], entry["tags"]
    if not isinstance(where, str) or not where.strip() or not isinstance(tags, list) or not tags:
        raise ValueError(f"must have entries of the form {form}, and has {json.dumps(entry)}")
    return Named(where, tuple(str(tag) for tag in tags))
