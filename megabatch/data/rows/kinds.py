"""The conversations in a row of each kind, for whoever reads rows before they are tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, conversation_of
from megabatch.data.rows.judged import judged_of
from megabatch.data.rows.labelled import said_in
from megabatch.data.rows.preference import preference_of
from megabatch.data.rows.prompts import prompt_of
from megabatch.data.rows.ranked import ranked_of
from megabatch.data.rows.steps import stepwise_of
from megabatch.data.rows.turns import Message
from megabatch.data.rows.yes_no import questions_of
from megabatch.tasks import Rows


class Reader(Protocol):
    """Raises: DataError with the row's place."""

    def __call__(
        self, row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None
    ) -> Sequence[Conversation]: ...


def _one(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> Sequence[Conversation]:
    return (conversation_of(row, columns=columns, system=system),)


def _pair(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> Sequence[Conversation]:
    pair = preference_of(row, columns=columns, system=system)
    return pair.chosen, pair.rejected


def _labelled(
    row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None
) -> Sequence[Conversation]:
    said = said_in(row, columns=columns, system=system)
    return (Conversation([Message("user", said)]) if isinstance(said, str) else said,)


def _judged(
    row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None
) -> Sequence[Conversation]:
    return [one.conversation for one in judged_of(row, columns=columns, system=system)]


def _asked(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> Sequence[Conversation]:
    return (prompt_of(row, columns=columns, system=system).conversation,)


def _stepwise(
    row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None
) -> Sequence[Conversation]:
    found = stepwise_of(row, columns=columns, system=system)
    said = [Message("assistant", step) for step in found.steps]
    return (replace(found.prompt, messages=[*found.prompt.messages, *said]),)


def _ranked(
    row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None
) -> Sequence[Conversation]:
    ranked = ranked_of(row, columns=columns)
    said = (ranked.anchor, *ranked.positives, *ranked.negatives)
    return tuple(Conversation([Message("user", one)]) if isinstance(one, str) else one for one in said)


def _questions(
    row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None
) -> Sequence[Conversation]:
    return [one.conversation for one in questions_of(row, columns=columns, system=system)]


READERS: Mapping[Rows, Reader] = {
    "documents": _one,
    "conversations": _one,
    "pairs": _pair,
    "judged": _judged,
    "labelled": _labelled,
    "steps": _stepwise,
    "prompts": _asked,
    "ranked": _ranked,
    "candidates": _ranked,
    "yes_no": _questions,
}
"""The reader of each kind of rows."""
