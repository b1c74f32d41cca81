"""Kinds of answers, texts or documents that a loss tells apart, of which its data needs two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from megabatch.config.heads import problem_type
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.data.rows.files import Row
from megabatch.data.rows.judged import judged_of
from megabatch.data.rows.labels import label_of
from megabatch.data.rows.ranked import NOTHING_TO_COMPARE, candidates_of
from megabatch.data.rows.steps import stepwise_of


class Contrast(NamedTuple):
    """How rows show the kinds."""

    kinds: Callable[[Row], list[int]]
    """Those that a row has. Raises: DataError with the row's place."""
    lacking: Callable[[int], str]
    """What is wrong with the first row of data that has one kind alone."""


def contrast_of(recipe: Recipe) -> Contrast | None:
    """None where the task's loss has nothing to tell apart, or each row has all of it."""
    rows = None if recipe.kind is None else recipe.kind.rows
    return None if rows not in _OF_ROWS else _OF_ROWS[rows](recipe)


def _judged(recipe: Recipe) -> Contrast:
    data = recipe.data

    def lacking(kind: int) -> str:
        own, other = ("good", "bad") if kind else ("bad", "good")
        return f"is a {own} answer, as all are; the loss tells good from bad ones, so add {other} ones"

    def kinds(row: Row) -> list[int]:
        return [int(one.label) for one in judged_of(row, columns=data.columns, system=data.system)]

    return Contrast(kinds, lacking)


def _labelled(recipe: Recipe) -> Contrast | None:
    columns, labels = recipe.data.columns, resolved(recipe.training.num_labels)
    if problem_type(recipe) != "single_label_classification":
        return None

    def lacking(kind: int) -> str:
        return f"has label {kind}, as all rows have; a classifier needs at least two classes to tell apart"

    def kinds(row: Row) -> list[int]:
        return [int(label_of(row, "single_label_classification", labels, columns=columns)["label"])]

    return Contrast(kinds, lacking)


def _steps(recipe: Recipe) -> Contrast:
    data = recipe.data

    def lacking(kind: int) -> str:
        own, other = ("right", "wrong") if kind else ("wrong", "right")
        return f"has {own} steps alone, as all rows have; the loss tells right from wrong ones, so add {other} ones"

    def kinds(row: Row) -> list[int]:
        return [int(one) for one in stepwise_of(row, columns=data.columns, system=data.system).labels]

    return Contrast(kinds, lacking)


def _candidates(recipe: Recipe) -> Contrast:
    columns = recipe.data.columns

    def kinds(row: Row) -> list[int]:
        found = candidates_of(row, columns=columns)
        return [*[1 for _ in found.positives], *[0 for _ in found.negatives]]

    return Contrast(kinds, lambda kind: f"the query {NOTHING_TO_COMPARE}; no other query of the data has one either")


_OF_ROWS: Mapping[str | None, Callable[[Recipe], Contrast | None]] = {
    "judged": _judged,
    "labelled": _labelled,
    "steps": _steps,
    "candidates": _candidates,
    "yes_no": _candidates,
}
