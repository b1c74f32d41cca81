"""Rows with a query and documents → for each document a question that is answered with yes or no.

The turns are Qwen3-Reranker's: a system turn says what to judge and how to answer, and the user's turn has the
instruction, the query and the document. The query and each document are a text, or one turn; a system turn before the
query is the row's own instruction, as in ms-swift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation
from megabatch.data.rows.ranked import Ranked, Said, candidates_of
from megabatch.data.rows.turns import Message
from megabatch.errors import DataError

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_ANSWER_AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}
"""Templates of models that think then write an empty thought; others do not read it."""


class Question(NamedTuple):
    """A document's conversation up to where the answer begins."""

    conversation: Conversation
    fits: bool


def questions_of(
    row: Row,
    *,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    instruction: str = "",
    ranked: Ranked | None = None,
) -> Sequence[Question]:
    """A question for each document of a row, those that fit first.

    Args: columns: as of `ranked_of`; system: replaces the system turn; instruction: of rows without their own; ranked:
    the row's texts, where they have been read.
    Raises: DataError with the row's place.
    """
    ranked = candidates_of(row, columns=columns) if ranked is None else ranked
    own, query = _query(ranked.anchor, row)
    asked = f"<Instruct>: {own or instruction}\n<Query>: {query}\n<Document>: "
    documents = [(one, True) for one in ranked.positives] + [(one, False) for one in ranked.negatives]
    return [
        Question(
            Conversation(
                [Message("system", system or SYSTEM), Message("user", asked + _text(document, row))],
                columns=_ANSWER_AT_ONCE,
            ),
            fits,
        )
        for document, fits in documents
    ]


def _query(said: Said, row: Row) -> tuple[str, str]:
    """(instruction or "", query)"""
    if not isinstance(said, str) and len(said.messages) == 2 and said.messages[0].role == "system":
        return said.messages[0].content, said.messages[1].content
    return "", _text(said, row)


def _text(said: Said, row: Row) -> str:
    if isinstance(said, str):
        return said
    if len(said.messages) != 1:
        raise DataError(
            f"{row.origin}: has {len(said.messages)} turns where a generative reranker needs one; give the query and "
            "each document as a text or one turn (a system turn before the query is its instruction)"
        )
    return said.messages[0].content
