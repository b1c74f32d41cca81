"""Rows → samples: format, template, tokens, length limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megabatch.data.rows.files import Line, Row, parsed
from megabatch.data.rows.formats import channel_of
from megabatch.data.rows.preprocess import DROPPED, preprocess_of
from megabatch.data.tokens import tokenizer
from megabatch.data.tokens.candidates import FITS, Candidates
from megabatch.data.tokens.chunk import Chunk
from megabatch.data.tokens.conversations import Conversations
from megabatch.data.tokens.documents import Documents
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.judged import JudgedAnswers
from megabatch.data.tokens.labelled import Labelled
from megabatch.data.tokens.pairs import EQUAL, Pairs
from megabatch.data.tokens.prompts import Prompts
from megabatch.data.tokens.ranked import NEGATIVE, POSITIVE, ROLE, Ranked
from megabatch.data.tokens.sample import CHANNEL, TEACHER_NUMBER, Encoded, Item
from megabatch.data.tokens.shared import with_shared
from megabatch.data.tokens.steps import Steps
from megabatch.data.tokens.teachers import teacher_of
from megabatch.data.tokens.yes_no import YesNo
from megabatch.errors import DataError
from megabatch.tasks import Rows


class RowEncoder(Protocol):
    """Encodes one kind of rows."""

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        """The samples of each row; none where a remark says why. Raises: DataError with the row's file and line."""
        ...


class _Kind(Protocol):
    def __call__(self, tokenizer: Any, encoding: Encoding) -> RowEncoder: ...


ROWS: Mapping[Rows, _Kind] = {
    "documents": Documents,
    "conversations": Conversations,
    "pairs": Pairs,
    "judged": JudgedAnswers,
    "labelled": Labelled,
    "steps": Steps,
    "prompts": Prompts,
    "ranked": Ranked,
    "candidates": Candidates,
    "yes_no": YesNo,
}
"""The encoder of each kind of rows."""

LEARNED_WHOLE: frozenset[Rows] = frozenset({"labelled", "ranked", "candidates", "yes_no"})
"""Rows whose samples have something to learn as a whole, and not in their tokens."""

_ALL_LABELS: frozenset[Rows] = frozenset({"steps"})
"""Rows that are dropped where the length limit would cut off something to learn."""


_SHARING: frozenset[Rows] = frozenset({"pairs", "candidates"})
"""Rows whose samples may have their first tokens in common: answers to a prompt, documents of a query."""


_COMPARED: Mapping[Rows, tuple[str, tuple[float, float]]] = {
    "pairs": ("chosen", (1.0, 0.0)),
    "ranked": (ROLE, (POSITIVE, NEGATIVE)),
    "candidates": (FITS, (1.0, 0.0)),
    "yes_no": (FITS, (1.0, 0.0)),
}
"""The column that tells the samples of an item apart, and its values for those that the loss compares."""
CUT_ALIKE = "cut to max_length, what should be told apart is the same tokens"


class Encoder:
    """Turns rows into samples; loads the tokenizer once."""

    def __init__(self, encoding: Encoding) -> None:
        """Raises: DataError for the tokenizer or the template."""
        self.encoding = encoding
        self.tokenizer = tokenizer.load(encoding.tokenizer)
        self.rows = ROWS[encoding.rows](self.tokenizer, encoding)
        self._learns_tokens = encoding.rows not in LEARNED_WHOLE
        self._preprocess = preprocess_of(encoding)

    def encode(self, unparsed: Sequence[Row | Line]) -> Chunk:
        """Samples of these rows, in order. Raises: DataError with the row's file and line."""
        chunk = Chunk()
        rows = self._preprocessed(list(map(parsed, unparsed)), chunk)
        for row, item in zip(rows, self.rows.encode(rows, chunk.remarks) if rows else (), strict=True):
            kept = self._limited(item, row) if item else []
            if not item:  # equal answers, which `Pairs` counts
                chunk.first.setdefault(EQUAL, row.origin)
                continue
            if not kept:
                chunk.drop("longer than max_length", row.origin)
            elif self._learns_tokens and not _learns(kept):
                chunk.drop("nothing to learn", row.origin)
            elif kept[0] is not item and self._cut_alike(kept[0]):
                chunk.drop(CUT_ALIKE, row.origin)
            else:
                chunk.remarks["longer than max_length, cut into pieces"] += len(kept) > 1
                names, taught = self._names(row), self._taught(row)
                for each in map(with_shared, kept) if self.encoding.rows in _SHARING else kept:
                    named = [one._replace(names=names, columns={**one.columns, **taught}) for one in each]
                    chunk.add(named if names or taught else each, row.origin)
        return chunk

    def _preprocessed(self, rows: list[Row], chunk: Chunk) -> list[Row]:
        if self._preprocess is None:
            return rows
        made = [self._preprocess(row) for row in rows]
        if none := sum(not some for some in made):
            chunk.dropped[DROPPED] += none
        return [row for some in made for row in some]

    def _names(self, row: Row) -> dict[str, str]:
        """Names shared by all samples of a row."""
        return {CHANNEL: channel_of(row, columns=self.encoding.columns)} if self.encoding.channels else {}

    def _taught(self, row: Row) -> dict[str, float]:
        """Which of several teachers a row has."""
        if not self.encoding.teachers:
            return {}
        return {TEACHER_NUMBER: float(teacher_of(row, self.encoding.teachers, key=self.encoding.teacher_tag_key))}

    def _limited(self, item: Item, row: Row) -> list[Item]:
        """The item with every sample cut to max_length, or its pieces, or nothing if it is dropped."""
        limit, strategy = self.encoding.max_length, self.encoding.truncation_strategy
        longest = max(len(sample.ids) for sample in item)
        if limit is None or longest <= limit:
            return [item]
        if strategy == "delete":
            return []
        if strategy == "raise":
            raise DataError(
                f"{row.origin}: has {longest} tokens, above data.max_length={limit}; raise data.max_length, "
                f"or set data.truncation_strategy to delete, left or right (for pt, to split)"
            )
        if strategy == "split":
            return [[piece] for sample in item for piece in pieces(sample, limit)]
        cut = [sample.part(slice(-limit, None) if strategy == "left" else slice(limit)) for sample in item]
        if self.encoding.rows in _ALL_LABELS and list(map(_learned, cut)) != list(map(_learned, item)):
            return []
        return [cut]

    def _cut_alike(self, item: Item) -> bool:
        """Whether samples that the loss compares are the same tokens."""
        apart = _COMPARED.get(self.encoding.rows)
        if apart is None:
            return False
        column, kinds = apart
        better, worse = ({one.ids.tobytes() for one in item if one.columns[column] == kind} for kind in kinds)
        return not better.isdisjoint(worse)


def _learns(items: Sequence[Item]) -> bool:
    """Whether there is something to learn in any piece of a sample, and in every sample of an item of several."""
    learned = [[_learned(sample) > 0 for sample in item] for item in items]
    return any(map(any, learned)) if len(items) > 1 else all(learned[0])


def _learned(sample: Encoded) -> int:
    """How many of a sample's tokens are learned."""
    return int(np.count_nonzero(sample.weights))


def pieces(encoded: Encoded, limit: int) -> list[Encoded]:
    """A sample cut into pieces of `limit` tokens; the last may be shorter.

    Nothing predicts the first token of a piece. So each piece starts with the last token of the piece before, only as
    context: every token but the sample's first is predicted once, whatever the limit.
    """
    return [encoded.part(slice(start, start + limit)) for start in range(0, len(encoded.ids) - 1, limit - 1)]
