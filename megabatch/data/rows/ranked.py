"""Rows with an anchor and texts that are like it or not: for embeddings and rerankers.

| what | fields |
| --- | --- |
| anchor | `query`, `anchor` or `sentence1`: a text; or `messages` |
| positives | `positive`, `positives` or `sentence2`: a text or a list of texts; or `positive_messages` |
| negatives | `negative`, `negatives`, `negative_1`, …: texts or lists; and `negative_messages`: conversations |
| label | `label` or `score`: a number, the similarity of anchor and positive |

A list may be its JSON text, as in CSV. All positives and negatives of a row are taken, whichever fields have them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from megabatch.config.embedding import Embedding
from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, is_text, renamed, require_words
from megabatch.data.rows.numbers import is_number, told
from megabatch.data.rows.turns import from_json, short, turns_of
from megabatch.errors import DataError
from megabatch.values import dataclass

Said = str | Conversation
_ANCHORS = ("query", "anchor", "sentence1", "messages")
_POSITIVES = ("positive", "positives", "sentence2", "positive_messages")
_NEGATIVES = ("negative", "negatives", "negative_messages")
_NUMBERED = re.compile(r"negative_\d+")
_LABELS = ("label", "score")


@dataclass(frozen=True, slots=True)
class Ranked:
    """One row."""

    anchor: Said
    positives: Sequence[Said]
    negatives: Sequence[Said] = ()
    label: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, which nothing reads."""


def ranked_of(row: Row, *, columns: Mapping[str, str] | None = None) -> Ranked:
    """The texts of a row. Raises: DataError with the row's place."""
    fields = {name: value for name, value in renamed(row, columns).items() if value is not None}
    asked = [name for name in _ANCHORS if name in fields][:1]
    liked = [name for name in _POSITIVES if name in fields]
    others = [name for name in fields if name in _NEGATIVES or _NUMBERED.fullmatch(name)]
    anchors = [one for name in asked for one in _said(row, name, fields[name], several=False)]
    positives, negatives = (
        [one for name in names for one in _said(row, name, fields[name], several=True)] for names in (liked, others)
    )
    if not anchors or not positives:
        needed = "query, anchor, sentence1 or messages" if not anchors else "positive, sentence2 or positive_messages"
        has = ", ".join(map(repr, sorted(fields))) or "no field"
        raise DataError(f"{row.origin}: has none of {needed}; it has {has}, and data.columns renames")
    if any(one in positives for one in negatives):
        raise DataError(f"{row.origin}: one text is positive and negative; delete it from the negatives")
    labelled = next(((name, said) for name in _LABELS if (said := told(fields.get(name))) is not None), None)
    used = {*asked, *liked, *others, *((labelled[0],) if labelled else ())}
    rest = {name: value for name, value in fields.items() if name not in used}
    return Ranked(anchors[0], positives, negatives, _label(row, labelled), rest)


def candidates_of(row: Row, *, columns: Mapping[str, str] | None = None) -> Ranked:
    """The texts of a row for a reranker, which reads no label. Raises: DataError with the row's place."""
    found = ranked_of(row, columns=columns)
    if found.label is not None and (fault := unlike(found.label, of="rerankers")) is not None:
        raise DataError(f"{row.origin}: {fault}")
    return found


def unlike(label: float, *, of: str) -> str | None:
    """What is wrong where no label is read, if one says that the positive text is none. NaN is no label."""
    if math.isnan(label) or label > 0:
        return None
    return (
        f"says {label:g} (label or score) of its positive text, and {of} read no label; make it a negative text, or "
        "rename the column with data.columns"
    )


def _said(row: Row, name: str, value: Any, *, several: bool) -> Iterator[Said]:
    """The texts or conversations of one field."""
    if not name.endswith("messages"):
        listed = _list_of(value) if several else None
        yield from (_text(row, name, one) for one in ([value] if listed is None else listed))
        return
    place = f"{row.origin}: {name}"
    value = from_json(value, place=place) if isinstance(value, str) else value
    nested = several and isinstance(value, list) and bool(value) and isinstance(value[0], list)
    for one in value if nested else [value] if value else []:
        said = Conversation(turns_of(one, place=place).messages)
        require_words(said, row, name)
        yield said


def _list_of(value: Any) -> list[Any] | None:
    """A list, also as JSON text; None for anything else, such as a text that begins with a bracket."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None
    return value if isinstance(value, list) else None


def _text(row: Row, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not is_text(value):
        raise DataError(f"{row.origin}: {name} must be a text that is not empty, not {short(value)}")
    return value


def _label(row: Row, labelled: tuple[str, Any] | None) -> float | None:
    """Of a field and what it says; true is 1, and false 0."""
    if labelled is None:
        return None
    name, value = labelled
    if not is_number(value) and not isinstance(value, bool):
        raise DataError(f"{row.origin}: {name} must be a finite number, not {short(value)}")
    return float(value)


def embedding_fault(group: Embedding, *, positives: int, negatives: int, label: float | None) -> str | None:
    """What a row lacks for the loss of an embedding model, or has that it does not read; None if it fits.

    Args: positives, negatives: how many; label: None or NaN if there is none.
    """
    if positives != 1:
        return "must have one positive text; make a row for each"
    if group.loss_type == "infonce":
        if label is not None and (fault := unlike(label, of="embeddings with infonce")) is not None:
            return fault
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
