"""Rows with a query and documents: one conversation for each document, which it ends with; they stay together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, with_system
from megabatch.data.rows.ranked import Said as Text
from megabatch.data.rows.ranked import candidates_of
from megabatch.data.rows.turns import Message
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.labelled import Said
from megabatch.data.tokens.ranked import count_columns
from megabatch.data.tokens.sample import Encoded, Item

FITS = "fits"
"""Column: 1 for a document that fits the query, 0 for another."""


class Candidates:
    """The query as the user's turn and a document as the assistant's, as `apply_chat_template` renders them."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._encoding, self._said = encoding, Said(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        ranked = [candidates_of(row, columns=self._encoding.columns) for row in rows]
        count_columns(rows, ranked, remarks)
        system = self._encoding.system
        said = [
            (row, Conversation(with_system([*_turns(of.anchor, "user"), *_turns(document, "assistant")], system)))
            for row, of in zip(rows, ranked, strict=True)
            for document in (*of.positives, *of.negatives)
        ]
        places = [str(row.origin) for row, _ in said]
        encoded = iter(self._said.encode([one for _, one in said], places=places, remarks=remarks))
        fits = [[1.0] * len(of.positives) + [0.0] * len(of.negatives) for of in ranked]
        return [[_judged_at_its_end(next(encoded), one) for one in item] for item in fits]


def _judged_at_its_end(document: Encoded, fits: float) -> Encoded:
    """The last token alone counts, so that documents may share the tokens of their query."""
    weights = np.zeros_like(document.weights)
    weights[-1:] = 1
    return document._replace(weights=weights, columns={FITS: fits})


def _turns(said: Text, role: str) -> list[Message]:
    return [Message(role, said)] if isinstance(said, str) else said.messages
