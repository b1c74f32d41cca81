"""Rows that are plain texts: pretraining."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import conversation_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.fitting import check_columns
from megabatch.data.tokens.plain import PlainTexts, weighed
from megabatch.data.tokens.sample import Encoded, Item
from megabatch.errors import DataError


class Documents:
    """Encodes the text with the tokenizer's own special tokens, then EOS; trains on every token."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """Raises: DataError for a tokenizer without EOS."""
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"model.tokenizer: {encoding.tokenizer} has no eos_token, which ends every document of a pretraining "
                f"run; set it in tokenizer_config.json"
            )
        self._eos = tokenizer.eos_token_id
        self._plain = PlainTexts(tokenizer, encoding)
        self._columns: Mapping[str, str] | None = encoding.columns
        self._system = encoding.system

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        conversations = [conversation_of(row, columns=self._columns, system=self._system) for row in rows]
        for row, conversation in zip(rows, conversations, strict=True):
            check_columns(row, conversation.columns, remarks)
        texts = ["\n".join(m.content for m in conversation.messages) for conversation in conversations]
        return [[self._ended(encoded)] for encoded in self._plain.encode(texts, remarks)]

    def _ended(self, encoded: Encoded) -> Encoded:
        ids = encoded.ids.tolist()
        return weighed(ids if ids[-1:] == [self._eos] else [*ids, self._eos])
