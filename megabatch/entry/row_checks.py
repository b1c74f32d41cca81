"""What must hold of every row of a task's data, without its tokenizer: asked before submission."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.heads import problem_type
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.config.training import ProblemType
from megabatch.data.rows.files import Row

Check = Callable[[Row], object]
"""Raises: DataError with the row's place."""


def row_check(recipe: Recipe) -> Check:
    """The check of the task's rows."""
    from megabatch.data.rows.kinds import READERS  # a dry run reads no data

    data, rows = recipe.data, "conversations" if recipe.kind is None else recipe.kind.rows
    read = READERS[rows]
    check_label = _label_check(recipe) if rows == "labelled" else None

    def check(row: Row) -> None:
        read(row, columns=data.columns, system=data.system)
        if check_label is not None:
            check_label(row)

    return check


def _label_check(recipe: Recipe) -> Check:
    from megabatch.data.rows.labels import label_of

    labels, columns = resolved(recipe.training.num_labels), recipe.data.columns
    kind: ProblemType = resolved(problem_type(recipe))
    return lambda row: label_of(row, kind, labels, columns=columns)
