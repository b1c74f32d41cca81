"""Rows with a prompt and the steps of an answer, each right or wrong (TRL's stepwise supervision).

| what | fields |
| --- | --- |
| prompt | as of `prompts`: a text (`prompt`, `question`, `query`, `instruction`) or turns |
| steps | `completions`: a list of texts |
| labels | `labels`: a list with true or false (1 or 0) for each of them |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, is_text, renamed
from megabatch.data.rows.numbers import is_truth, told
from megabatch.data.rows.prompts import prompt_of
from megabatch.data.rows.turns import from_json, short
from megabatch.errors import DataError
from megabatch.values import dataclass

_STEPS, _LABELS = "completions", "labels"


@dataclass(frozen=True, slots=True)
class Stepwise:
    """One row."""

    prompt: Conversation
    steps: Sequence[str]
    labels: Sequence[bool]
    """Whether each step is right."""
    columns: Mapping[str, Any]
    """The row's other columns."""


def stepwise_of(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> Stepwise:
    """The prompt, steps and labels of one row.

    Args: as of `conversation_of`. Raises: DataError with the row's place for a list that is missing or empty, lists of
    different lengths, an empty step, a label that is neither true nor false, and what `prompt_of` refuses.
    """
    fields = renamed(row, columns)
    steps, labels = (_list(fields.pop(name, None), name, row) for name in (_STEPS, _LABELS))
    if len(steps) != len(labels):
        raise DataError(
            f"{row.origin}: has {len(steps)} {_STEPS} and {len(labels)} {_LABELS}; every step needs one label"
        )
    for index, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str) or not step.strip() or not is_text(step):
            raise DataError(f"{row.origin}: {_STEPS}[{index}] must be a text that is not empty, not {short(step)}")
        if not is_truth(told(label)):
            raise DataError(f"{row.origin}: {_LABELS}[{index}] must be true or false (1 or 0), not {short(label)}")
    asked = prompt_of(replace(row, fields=fields), system=system)
    return Stepwise(asked.conversation, steps, [bool(told(label)) for label in labels], asked.columns)


def _list(value: Any, name: str, row: Row) -> list[Any]:
    if value is None:
        raise DataError(
            f"{row.origin}: has no {name}; give {_STEPS} (the steps of an answer) and {_LABELS} (true for each right "
            "one), or rename columns with data.columns"
        )
    if isinstance(value, str):  # as in CSV
        value = from_json(value, place=f"{row.origin}: {name}")
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.origin}: {name} must be a list that is not empty, not {short(value)}")
    return value
