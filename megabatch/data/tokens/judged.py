"""Rows with answers that are labelled good or bad, and for each a mismatched answer: one to another prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megabatch.data.rows.files import Row
from megabatch.data.rows.judged import judged_of
from megabatch.data.tokens.conversations import template_of
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Encoded, Item

ALONE = "the only answer of its block of rows: its mismatched answer is its own"
CROWDED = (
    "to a prompt that more than half of the answers of its block of rows are to: its mismatched answer is one of them"
)


class JudgedAnswers:
    """The answers of a row, each followed by its prompt with an answer to another prompt of the block of rows.

    Columns: `label` is 1 for a desirable answer; `matched` is 0 for a mismatched one, which estimates how far the
    policy is from the reference (arXiv:2402.01306, section 4.1). Without `Encoding.mismatches` there are none.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """Raises: DataError for the template."""
        self._encoding = encoding
        self._template = template_of(tokenizer, encoding)

    def encode(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Item]:
        settings = self._encoding
        found = [judged_of(row, columns=settings.columns, system=settings.system) for row in rows]
        encoded = self._template.encode(
            [one.conversation for some in found for one in some],
            places=[str(row.origin) for row, some in zip(rows, found, strict=True) for _ in some],
            loss_scale=settings.loss_scale,
            remarks=remarks,
        )
        labels = [float(one.label) for some in found for one in some]
        answers = [
            [one._replace(columns={"label": label, "matched": 1.0})]
            for one, label in zip(encoded, labels, strict=True)
        ]
        if settings.mismatches:
            others = _answers_to_others([one.ids[: _answer_of(one)].tobytes() for one in encoded])
            for number, (own, label) in enumerate(zip(encoded, labels, strict=True)):
                if (other := others[number]).is_own_prompt:
                    remarks[ALONE if len(encoded) == 1 else CROWDED] += 1
                mixed = self._cut(_mismatched(own, encoded[other.number]))
                answers[number].append(mixed._replace(columns={"label": label, "matched": 0.0}))
        parts = iter(answers)
        return [[sample for _ in some for sample in next(parts)] for some in found]

    def _cut(self, mixed: Encoded) -> Encoded:
        """Within the limit, at the end at which answers are cut: no row is dropped for its mismatched answer."""
        limit = self._encoding.max_length
        if limit is None or len(mixed.ids) <= limit:
            return mixed
        return mixed.part(slice(-limit, None) if self._encoding.truncation_strategy == "left" else slice(limit))


class _Other(NamedTuple):
    number: int
    is_own_prompt: bool


def _answers_to_others(prompts: Sequence[bytes]) -> list[_Other]:
    """For each answer another one, and each once.

    Of the answers in the order of their prompts it is the one as many places before, in a circle, as the prompt with
    most answers has: one to the same prompt only where that prompt has more than half of them.
    """
    groups: dict[bytes, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(number)
    order = [number for group in groups.values() for number in group]
    most = max(map(len, groups.values()), default=0)
    shift = most if most < len(order) else 1
    others = {own: order[place - shift] for place, own in enumerate(order)}
    return [_Other(others[own], prompts[others[own]] == prompt) for own, prompt in enumerate(prompts)]


def _mismatched(asked: Encoded, said: Encoded) -> Encoded:
    """The prompt of one sample with the answer of another."""
    prompt, start = slice(_answer_of(asked)), _answer_of(said)
    return Encoded(
        np.concatenate([asked.ids[prompt], said.ids[start:]]),
        np.concatenate([asked.weights[prompt], said.weights[start:]]),
    )


def _answer_of(sample: Encoded) -> int:
    """Where the first learned token is; the end if there is none."""
    learned = np.flatnonzero(sample.weights)
    return int(learned[0]) if len(learned) else len(sample.ids)
