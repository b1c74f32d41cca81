"""Rows that are conversations, rendered by a chat template; the assistant's turns are learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import conversation_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Item
from megabatch.data.tokens.templates import Template


class Conversations:
    """One sample for each row."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """Raises: DataError for the template."""
        self._encoding = encoding
        self._template = template_of(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        settings = self._encoding
        conversations = [conversation_of(row, columns=settings.columns, system=settings.system) for row in rows]
        places = [str(row.origin) for row in rows]
        encoded = self._template.encode(conversations, places=places, loss_scale=settings.loss_scale, remarks=remarks)
        return [[one] for one in encoded]


def template_of(tokenizer: Any, encoding: Encoding) -> Template:
    """The template that renders conversations. Raises: DataError."""
    return Template(
        tokenizer,
        name=encoding.template,
        variables=encoding.template_variables,
        sanitize_control_tokens=encoding.sanitize_control_tokens,
        new_special_tokens=encoding.new_special_tokens,
    )
