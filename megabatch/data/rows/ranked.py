"""Rows with an anchor and texts that are like it or not: for embeddings and rerankers.

| what | fields |
| --- | --- |
| anchor | `query`, `anchor` or `sentence1`: a text; or `messages` |
| positive | `positive` or `sentence2`: a text; or `positive_messages` |
| negatives | `negative` or `negatives`: a text or a list of texts; or `negative_messages`: a list of conversations |
| label | `label` or `score`: a number, the similarity of anchor and positive |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megabatch.config.embedding import Embedding
from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, is_text, renamed
from megabatch.data.rows.numbers import is_number
from megabatch.data.rows.turns import from_json, short, turns_of
from megabatch.errors import DataError

Said = str | Conversation


@dataclass(frozen=True, slots=True)
class Ranked:
    """One row."""

    anchor: Said
    positives: Sequence[Said]
    negatives: Sequence[Said] = ()
    label: float | None = None


def ranked_of(row: Row, *, columns: Mapping[str, str] | None = None) -> Ranked:
    """The texts of a row. Raises: DataError with the row's place."""
    fields = {name: value for name, value in renamed(row, columns).items() if value is not None}
    anchors = _said(row, fields, ("query", "anchor", "sentence1"), "messages", several=False)
    positives = _said(row, fields, ("positive", "positives", "sentence2"), "positive_messages", several=True)
    negatives = _said(row, fields, ("negative", "negatives"), "negative_messages", several=True)
    if not anchors or not positives:
        needed = "query, anchor, sentence1 or messages" if not anchors else "positive, sentence2 or positive_messages"
        has = ", ".join(map(repr, sorted(fields))) or "no field"
        raise DataError(f"{row.origin}: has none of {needed}; it has {has}, and data.columns renames")
    if any(one in positives for one in negatives):
        raise DataError(f"{row.origin}: one text is positive and negative; delete it from the negatives")
    return Ranked(anchors[0], positives, negatives, _label(row, fields))


def _said(
    row: Row, fields: Mapping[str, Any], names: Sequence[str], conversation: str, *, several: bool
) -> list[Said]:
    for name in names:
        if name in fields:
            value = fields[name]
            return [_text(row, name, one) for one in (value if several and isinstance(value, list) else [value])]
    if conversation not in fields:
        return []
    value, place = fields[conversation], f"{row.origin}: {conversation}"
    value = from_json(value, place=place) if isinstance(value, str) else value
    nested = several and isinstance(value, list) and bool(value) and isinstance(value[0], list)
    return [
        Conversation(turns_of(one, place=place).messages) for one in (value if nested else [value] if value else [])
    ]


def _text(row: Row, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not is_text(value):
        raise DataError(f"{row.origin}: {name} must be a text that is not empty, not {short(value)}")
    return value


def _label(row: Row, fields: Mapping[str, Any]) -> float | None:
    value = fields.get("label", fields.get("score"))
    if isinstance(value, str):
        value = from_json(value, place=f"{row.origin}: label")
    if value is None:
        return None
    if not is_number(value):
        raise DataError(f"{row.origin}: label must be a finite number, not {short(value)}")
    return float(value)


def embedding_fault(group: Embedding, *, positives: int, negatives: int, label: float | None) -> str | None:
    """What a row lacks for the loss of an embedding model, or has that it does not read; None if it fits.

    Args: positives, negatives: how many; label: None or NaN if there is none.
    """
    if positives != 1:
        return "must have one positive text; make a row for each"
    if group.loss_type == "infonce":
        lacks = negatives == 0 and not group.infonce_use_batch
        return "has no negative text, and embedding.infonce_use_batch is False" if lacks else None
    name = f"embedding.loss_type={group.loss_type!r}"
    if label is None or math.isnan(label):
        return f"has no label, which {name} needs"
    if negatives:
        return f"has negative texts, which {name} does not read; give them a label"
    if group.loss_type == "cosine_similarity":
        return "has a label that is no cosine, from -1 to 1" if abs(label) > 1 else None
    return None if label in (0, 1) else f"has another label than 0 and 1, which {name} needs"


NOTHING_TO_COMPARE = "has no document that does not fit it, so that there is nothing to compare; add negatives"
"""Of a reranker's query."""
