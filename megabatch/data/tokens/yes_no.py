"""Rows with a query and documents: one sample for each document, which ends where the answer yes or no begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.ranked import candidates_of
from megabatch.data.rows.yes_no import questions_of
from megabatch.data.tokens.candidates import FITS
from megabatch.data.tokens.conversations import template_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.ranked import count_columns
from megabatch.data.tokens.sample import Item


class YesNo:
    """The samples of a query stay together, each with the column `fits`."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """Raises: DataError for the template."""
        self._encoding, self._template = encoding, template_of(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        settings = self._encoding
        ranked = [candidates_of(row, columns=settings.columns) for row in rows]
        count_columns(rows, ranked, remarks)
        asked = [
            questions_of(row, system=settings.system, instruction=settings.instruction, ranked=texts)
            for row, texts in zip(rows, ranked, strict=True)
        ]
        places = [str(row.origin) for row, some in zip(rows, asked, strict=True) for _ in some]
        encoded = iter(
            self._template.encode_prompts([one.conversation for some in asked for one in some], places=places)
        )
        return [[next(encoded)._replace(columns={FITS: float(one.fits)}) for one in some] for some in asked]
