"""The label of a row: a number, a class, or several of them, in one form for every kind of classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megabatch.config.training import ProblemType
from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import renamed
from megabatch.data.rows.numbers import is_number, told
from megabatch.data.rows.turns import from_json, short
from megabatch.errors import DataError


def label_columns(problem_type: ProblemType, num_labels: int) -> tuple[str, ...]:
    """Names of the columns that hold a sample's label: one, or one for each label."""
    one = num_labels == 1 or problem_type == "single_label_classification"
    return ("label",) if one else tuple(f"label_{index}" for index in range(num_labels))


def label_of(
    row: Row, problem_type: ProblemType, num_labels: int, *, columns: Mapping[str, str] | None
) -> dict[str, float]:
    """The row's column `label` as the values of `label_columns`.

    Regression takes a number, or a list of `num_labels`. Single-label classification takes the number of the class,
    from 0, or true or false of two. Multi-label classification takes the list of the classes that the row has, or for
    each label whether the row has it (true and false, or 1.0 and 0.0).
    Raises: DataError with the row's place.
    """
    value, place = told(renamed(row, columns).get("label")), f"{row.origin}: label"
    if value is None:
        raise DataError(f"{place} is missing; rename its column with data.columns, or delete the row")
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # as in CSV
        value = from_json(value, place=place)
    if problem_type == "single_label_classification":
        return {"label": float(_class(value, num_labels, place=place))}
    if problem_type == "multi_label_classification":
        return _named(_several(value, num_labels, place=place), problem_type, num_labels)
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) != num_labels or not all(map(is_number, numbers)):
        raise DataError(f"{place} must be {_count(num_labels)}, as training.num_labels says, not {short(value)}")
    return _named([float(number) for number in numbers], problem_type, num_labels)


def _named(values: list[float], problem_type: ProblemType, num_labels: int) -> dict[str, float]:
    return dict(zip(label_columns(problem_type, num_labels), values, strict=True))


def _count(num_labels: int) -> str:
    return "a number" if num_labels == 1 else f"a list of {num_labels} numbers"


def _class(value: Any, num_labels: int, *, place: str) -> int:
    value = int(value) if isinstance(value, bool) and num_labels == 2 else value
    if not is_number(value) or value != int(value) or not 0 <= value < num_labels:
        raise DataError(
            f"{place} must be a class from 0 to {num_labels - 1}, as training.num_labels={num_labels} says, "
            f"not {short(value)}"
        )
    return int(value)


def _several(value: Any, num_labels: int, *, place: str) -> list[float]:
    if not isinstance(value, list):
        raise DataError(f"{place} must be the list of the row's classes, not {short(value)}")
    if value and all(isinstance(item, bool | float) for item in value):
        if len(value) != num_labels or not all(item in (0, 1) for item in value):
            raise DataError(f"{place} must have 1.0 or 0.0 for each of {num_labels} labels, not {short(value)}")
        return [float(item) for item in value]
    found = [_class(item, num_labels, place=place) for item in value]
    if len(set(found)) < len(found):
        raise DataError(
            f"{place} names a class twice: {short(value)}; list the classes that the row has, or write 1.0 or 0.0 for "
            f"each of {num_labels} labels"
        )
    return [float(index in found) for index in range(num_labels)]
