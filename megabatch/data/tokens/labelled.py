"""Rows with a label: a plain text, as the tokenizer encodes it, or turns that a chat template renders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, renamed
from megabatch.data.rows.labelled import said_in
from megabatch.data.rows.labels import label_of
from megabatch.data.tokens.conversations import template_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.fitting import check_columns
from megabatch.data.tokens.plain import PlainTexts
from megabatch.data.tokens.sample import Encoded, Item
from megabatch.data.tokens.templates import Template


class Said:
    """Encodes texts as `tokenizer(text)` does, and conversations as `apply_chat_template` does."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._tokenizer, self._encoding = tokenizer, encoding
        self._plain = PlainTexts(tokenizer, encoding)

    @cached_property
    def _template(self) -> Template:
        """Made for the first conversation: texts need none. Raises: DataError."""
        return template_of(self._tokenizer, self._encoding)

    def encode(
        self, said: Sequence[str | Conversation], *, places: Sequence[str], remarks: Counter[str]
    ) -> list[Encoded]:
        """One sample for each. Args and errors as of `Template.whole`."""
        texts = {index: one for index, one in enumerate(said) if isinstance(one, str)}
        spoken = {index: one for index, one in enumerate(said) if not isinstance(one, str)}
        found = dict(zip(texts, self._plain.encode(list(texts.values()), remarks), strict=True))
        if spoken:
            of = [places[index] for index in spoken]
            rendered = self._template.whole(list(spoken.values()), places=of, remarks=remarks)
            found |= zip(spoken, rendered, strict=True)
        return [found[index] for index in range(len(said))]


class Labelled:
    """One sample for each row, with its label as columns."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._encoding, self._said = encoding, Said(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        encoding = self._encoding
        assert encoding.problem_type is not None and encoding.num_labels is not None
        labels = [label_of(row, encoding.problem_type, encoding.num_labels, columns=encoding.columns) for row in rows]
        said = [said_in(row, columns=encoding.columns, system=encoding.system) for row in rows]
        for row, one in zip(rows, said, strict=True):
            if isinstance(one, str):
                fields = renamed(row, encoding.columns).items()
                check_columns(row, {name: value for name, value in fields if name not in ("text", "label")}, remarks)
        encoded = self._said.encode(said, places=[str(row.origin) for row in rows], remarks=remarks)
        return [[one._replace(columns=label)] for one, label in zip(encoded, labels, strict=True)]
