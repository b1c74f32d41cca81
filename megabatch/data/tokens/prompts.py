"""Rows that are prompts: tokens up to where the assistant's answer begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.prompts import prompt_of
from megabatch.data.tokens.conversations import template_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Item


class Prompts:
    """One sample for each row; its weights say nothing, since nothing of a prompt is learned."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """Raises: DataError for the template."""
        self._encoding = encoding
        self._template = template_of(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        settings = self._encoding
        asked = [prompt_of(row, columns=settings.columns, system=settings.system) for row in rows]
        places = [str(row.origin) for row in rows]
        return [[one] for one in self._template.encode_prompts([one.conversation for one in asked], places=places)]
