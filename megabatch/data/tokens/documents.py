"""Rows that are plain texts: pretraining."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, conversation_of
from megabatch.data.tokens.control_tokens import ESCAPED, ControlTokens
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.fitting import check_column
from megabatch.data.tokens.sample import Encoded, Item
from megabatch.data.tokens.tokenizer import backend
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
        self._backend = backend(tokenizer)
        written = encoding.new_special_tokens
        self._control = ControlTokens(tokenizer, of_the_data=written) if encoding.sanitize_control_tokens else None
        self._columns: Mapping[str, str] | None = encoding.columns
        self._system = encoding.system

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        conversations = [conversation_of(row, columns=self._columns, system=self._system) for row in rows]
        for row, conversation in zip(rows, conversations, strict=True):
            _check_columns(row, conversation, remarks)
        texts = ["\n".join(m.content for m in conversation.messages) for conversation in conversations]
        plain = self._backend.encode_batch(texts, add_special_tokens=True)
        return [[self._encoded(text, found.ids, remarks)] for text, found in zip(texts, plain, strict=True)]

    def _encoded(self, text: str, tokens: list[int], remarks: Counter[str]) -> Encoded:
        control = self._control
        if control is not None and control.may_be_in(text) and control.are_in(text):
            tokens = control.twin.encode(control.spelled(text).text, add_special_tokens=True).ids
            remarks[ESCAPED] += 1
        ids = np.asarray(tokens if tokens[-1:] == [self._eos] else [*tokens, self._eos], np.int32)
        weights: np.ndarray = np.ones(len(ids), np.float32)
        weights[:1] = 0
        return Encoded(ids, weights)


def _check_columns(row: Row, conversation: Conversation, remarks: Counter[str]) -> None:
    for name, value in conversation.columns.items():
        try:
            check_column(name, value, remarks)
        except DataError as e:
            raise DataError(f"{row.origin}: {e}") from e
