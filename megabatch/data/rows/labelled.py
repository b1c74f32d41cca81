"""Rows that are labelled as a whole: a text, or a conversation in which nobody need have answered."""

from __future__ import annotations

from collections.abc import Mapping

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, conversation_of, is_text, renamed, require_words
from megabatch.data.rows.turns import short
from megabatch.errors import DataError


def said_in(row: Row, *, columns: Mapping[str, str] | None, system: str | None) -> str | Conversation:
    """What a row says besides its `label`: its `text`, or its turns. Raises: DataError with the row's place."""
    text = renamed(row, columns).get("text")
    if text is None:
        said = conversation_of(row, columns=columns, system=system, answered=False, also=("label",))
        require_words(said, row, "the messages")
        return said
    if not isinstance(text, str) or not is_text(text) or not text.strip():
        raise DataError(f"{row.origin}: text must be a string that is not empty, not {short(text)}")
    return text
