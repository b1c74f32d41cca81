"""Rows with a good and a bad answer: pairs of samples, the chosen one first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megabatch.data.rows.files import Row
from megabatch.data.rows.preference import Preference, preference_of
from megabatch.data.tokens.conversations import template_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Item

EQUAL = "dropped: the chosen and the rejected answer are the same tokens"


class Pairs:
    """Two samples for each row. The column `chosen` is 1 and 0, and `margin` is that of the pair in both;
    with `Encoding.ref_log_probs`, `reference` is what a reference gave it."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """Raises: DataError for the template."""
        self._encoding = encoding
        self._template = template_of(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        """An item of two samples for each row, or an empty one (and a remark) where both answers are the same."""
        settings = self._encoding
        pairs = [preference_of(row, columns=settings.columns, system=settings.system) for row in rows]
        encoded = self._template.encode(
            [conversation for pair in pairs for conversation in (pair.chosen, pair.rejected)],
            places=[f"{row.origin} ({which})" for row in rows for which in ("chosen", "rejected")],
            loss_scale=settings.loss_scale,
            remarks=remarks,
        )
        items: list[Item] = []
        for number, pair in enumerate(pairs):
            chosen, rejected = encoded[2 * number : 2 * number + 2]
            if np.array_equal(chosen.ids, rejected.ids):
                remarks[EQUAL] += 1
                items.append([])
                continue
            items.append(
                [
                    sample._replace(columns={"chosen": is_chosen, "margin": pair.margin, **given})
                    for sample, is_chosen, given in zip((chosen, rejected), (1.0, 0.0), self._given(pair), strict=True)
                ]
            )
        return items

    def _given(self, pair: Preference) -> Sequence[Mapping[str, float]]:
        """What a reference gave both answers: NaN where the row does not say."""
        if not self._encoding.ref_log_probs:
            return ({}, {})
        return [{"reference": value} for value in pair.ref_logps or (math.nan, math.nan)]
