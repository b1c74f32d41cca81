"""Rows with a prompt and labelled steps of an answer: the prompt as the chat template renders it, then step by step.

Each step's text is tokenised alone and ends with the separator's tokens, as in TRL; the last of them is where a model
scores the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megabatch.data.rows.files import Row
from megabatch.data.rows.steps import Stepwise, stepwise_of
from megabatch.data.tokens.conversations import template_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.fitting import check_columns
from megabatch.data.tokens.plain import PlainTexts
from megabatch.data.tokens.sample import Encoded, Item
from megabatch.errors import DataError

RIGHT = "right"
"""Token column: 1 where a right step ends, 0 elsewhere."""
_INSIDE = "steps that contain prm.step_separator: where an answer is cut at it, they are two"


class Steps:
    """One sample for each row.

    A weight and a value of `RIGHT` belong to the position before their token, as of a prediction, and the last step
    ends with the last position. So one more token, which no score depends on, closes each sample.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """Raises: DataError for the template or the separator."""
        self._encoding, self._template = encoding, template_of(tokenizer, encoding)
        self._plain = PlainTexts(tokenizer, encoding, special_tokens=False)
        self._separator: list[int] = tokenizer.encode(encoding.step_separator, add_special_tokens=False)
        if not self._separator:
            raise DataError(f"prm.step_separator={encoding.step_separator!r} has no token in {encoding.tokenizer}")
        end = tokenizer.eos_token_id
        self._end = self._separator[-1] if end is None else end

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        settings = self._encoding
        found = [stepwise_of(row, columns=settings.columns, system=settings.system) for row in rows]
        for row, one in zip(rows, found, strict=True):
            self._count(row, one, remarks)
        prompts = self._template.encode_prompts(
            [one.prompt for one in found], places=[str(row.origin) for row in rows]
        )
        texts = iter(self._plain.encode([step for one in found for step in one.steps], remarks))
        return [
            [self._joined(prompt.ids, [next(texts).ids for _ in one.steps], one.labels)]
            for prompt, one in zip(prompts, found, strict=True)
        ]

    def _count(self, row: Row, found: Stepwise, remarks: Counter[str]) -> None:
        remarks[_INSIDE] += sum(self._encoding.step_separator in step for step in found.steps)
        remarks += Counter()  # without zeros
        check_columns(row, found.columns, remarks)

    def _joined(self, prompt: np.ndarray, steps: Sequence[np.ndarray], labels: Sequence[bool]) -> Encoded:
        parts = [prompt, *(part for step in steps for part in (step, self._separator)), [self._end]]
        ids: np.ndarray = np.concatenate(parts).astype(np.int32)
        behind = len(prompt) + np.cumsum([len(step) + len(self._separator) for step in steps])
        weights, right = np.zeros((2, len(ids)), np.float32)
        weights[behind] = 1
        right[behind] = labels
        return Encoded(ids, weights, token_columns={RIGHT: right})
