"""What must hold of every row of a task's data, without its tokenizer: asked before submission."""

from __future__ import annotations

from collections.abc import Callable

from megabatch.config.data import Data
from megabatch.config.heads import problem_type
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.config.training import ProblemType
from megabatch.data.rows.files import Row
from megabatch.data.rows.preprocess import preprocess_of
from megabatch.errors import ConfigError

_TRIED_ROWS = 16
"""Rows of each file that `data.preprocess` is tried on."""
Check = Callable[[Row], object]
"""Raises: DataError with the row's place."""


def row_check(recipe: Recipe) -> Check:
    """The check of the task's rows."""
    from megabatch.data.rows.kinds import READERS  # a dry run reads no data

    data, rows = recipe.data, "conversations" if recipe.kind is None else recipe.kind.rows
    read = READERS[rows]
    check_label = _label_check(recipe) if rows == "labelled" else None
    made_of = _made_of(data)

    def check(row: Row) -> None:
        for made in made_of(row):
            read(made, columns=data.columns, system=data.system)
            if check_label is not None:
                check_label(made)

    return check


def _made_of(data: Data) -> Callable[[Row], list[Row]]:
    """What `data.preprocess` makes of a row; only of each file's first rows, since it may be slow."""
    try:
        preprocess = preprocess_of(data)
    except ConfigError:  # `launch_checks` reports it, unless the ranks run another Python
        return lambda row: []
    if preprocess is None:
        return lambda row: [row]
    return lambda row: preprocess(row) if row.origin.number <= _TRIED_ROWS else []


def _label_check(recipe: Recipe) -> Check:
    from megabatch.data.rows.labels import label_of

    labels, columns = resolved(recipe.training.num_labels), recipe.data.columns
    kind: ProblemType = resolved(problem_type(recipe))
    return lambda row: label_of(row, kind, labels, columns=columns)
