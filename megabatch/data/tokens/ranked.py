"""Rows with an anchor and texts like it or not: one sample for each text, which stay together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, with_system
from megabatch.data.rows.ranked import Ranked as Texts
from megabatch.data.rows.ranked import ranked_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.fitting import check_columns
from megabatch.data.tokens.labelled import Said
from megabatch.data.tokens.sample import Item

ROLE, LABEL = "role", "label"
"""Columns: what a sample is, and the row's label, NaN where it has none."""
ANCHOR, POSITIVE, NEGATIVE = 0.0, 1.0, 2.0


class Ranked:
    """The anchor, its positives, its negatives, each as `tokenizer(text)` or `apply_chat_template` gives it."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._encoding, self._said = encoding, Said(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        ranked = [ranked_of(row, columns=self._encoding.columns) for row in rows]
        count_columns(rows, ranked, remarks)
        said = [(row, self._with_system(one)) for row, of in zip(rows, ranked, strict=True) for one in _all(of)]
        encoded = iter(
            self._said.encode([one for _, one in said], places=[str(row.origin) for row, _ in said], remarks=remarks)
        )
        items: list[Item] = []
        for of in ranked:
            label = math.nan if of.label is None else of.label
            roles = [ANCHOR, *[POSITIVE] * len(of.positives), *[NEGATIVE] * len(of.negatives)]
            items.append([next(encoded)._replace(columns={ROLE: role, LABEL: label}) for role in roles])
        return items

    def _with_system(self, said: str | Conversation) -> str | Conversation:
        """Turns behind `data.system`; a text has no turns."""
        if isinstance(said, str):
            return said
        return replace(said, messages=with_system(said.messages, self._encoding.system))


def count_columns(rows: Sequence[Row], ranked: Sequence[Texts], remarks: Counter[str]) -> None:
    """Counts columns that nothing reads. Raises: DataError with the row's place for media."""
    for row, found in zip(rows, ranked, strict=True):
        check_columns(row, found.columns, remarks)


def _all(of: Any) -> list[Any]:
    return [of.anchor, *of.positives, *of.negatives]
