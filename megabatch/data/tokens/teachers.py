"""Which of several teachers a row has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from megabatch.data.rows.files import Row
from megabatch.errors import DataError

SOURCE = "dataset"
"""The column that rows need not have: their file's name stands for it."""


def teacher_of(row: Row, teachers: Sequence[tuple[str, int]], *, key: str) -> int:
    """The number of a row's teacher. Args: teachers: tags and numbers; key: the column with the tag.

    Raises: DataError for a row without a tag, or with one that no teacher has.
    """
    default = PurePath(row.origin.file).name if key == SOURCE else None
    tag = row.fields.get(key, default)
    for known, number in teachers:
        if str(tag) == known:
            return number
    has = f"has no column {key!r}" if tag is None else f"has {key}={str(tag)[:60]!r}"
    raise DataError(
        f"{row.origin}: {has}, and so no teacher: the recipe's teachers have the tags "
        f"{', '.join(repr(known) for known, _ in teachers)}"
    )
