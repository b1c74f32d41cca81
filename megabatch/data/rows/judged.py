"""Rows with an answer and whether it is a good one → labelled conversations.

Any conversation with `label` (true or 1: desirable, false or 0: undesirable). A row with a good and a bad answer
(`preference`) gives one of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, conversation_of, renamed, require_question
from megabatch.data.rows.numbers import is_truth, told
from megabatch.data.rows.preference import is_preference, preference_of
from megabatch.data.rows.turns import short
from megabatch.errors import DataError


class Judged(NamedTuple):
    """A conversation and whether its answer is desirable."""

    conversation: Conversation
    label: bool


def judged_of(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> list[Judged]:
    """The labelled answers of one row: one, or two of a pair.

    Args: as of `conversation_of`. Raises: DataError with the row's place for an empty prompt, a missing
    label, or one that is neither true nor false.
    """
    if is_preference(row, columns=columns):
        pair = preference_of(row, columns=columns, system=system)
        return [Judged(pair.chosen, True), Judged(pair.rejected, False)]
    fields = renamed(row, columns)
    label = told(fields.pop("label", None))
    if label is None:
        raise DataError(
            f"{row.origin}: has no label; give label (true for a good answer, false for a bad one), or a good and a "
            "bad answer"
        )
    if not is_truth(label):
        raise DataError(f"{row.origin}: label must be true or false (1 or 0), not {short(label)}")
    answered = conversation_of(replace(row, fields=fields), system=system)
    require_question(answered, row)
    return [Judged(answered, bool(label))]
