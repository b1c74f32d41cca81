"""What must hold of every row of a task's data, without its tokenizer: asked before submission."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megabatch.config.data import Data
from megabatch.config.heads import problem_type
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.config.training import ProblemType
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.preprocess import preprocess_of
from megabatch.errors import ConfigError, DataError
from megabatch.tasks import Rows

_TRIED_ROWS = 16
"""Rows of each file that `data.preprocess` is tried on."""
Check = Callable[[Row], object]
"""Raises: DataError with the row's place."""


def row_check(recipe: Recipe, *, labels: dict[float, Origin] | None = None) -> Check:
    """The check of the task's rows.

    Args: labels: receives each label of answers, or each class of rows that have one, and where it is first.
    """
    from megabatch.data.rows.judged import judged_of  # a dry run reads no data
    from megabatch.data.rows.kinds import READERS
    from megabatch.data.rows.labels import label_of

    data, rows = recipe.data, "conversations" if recipe.kind is None else recipe.kind.rows
    read = READERS[rows]
    further = _FURTHER.get(rows)
    check_more = None if further is None else further(recipe)
    classes = rows == "labelled" and problem_type(recipe) == "single_label_classification"
    made_of = _made_of(data)

    def check(row: Row) -> None:
        for made in made_of(row):
            read(made, columns=data.columns, system=data.system)
            if check_more is not None:
                check_more(made)
            if labels is not None and rows == "judged":
                for one in judged_of(made, columns=data.columns, system=data.system):
                    labels.setdefault(one.label, made.origin)
            if labels is not None and classes:
                labels.setdefault(label_of(made, *_kind_of(recipe), columns=data.columns)["label"], made.origin)

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

    kind, columns = _kind_of(recipe), recipe.data.columns
    return lambda row: label_of(row, *kind, columns=columns)


def _kind_of(recipe: Recipe) -> tuple[ProblemType, int]:
    """Of a classifier: what its labels are, and how many there are."""
    return resolved(problem_type(recipe)), resolved(recipe.training.num_labels)


def _embedding_check(recipe: Recipe) -> Check:
    from megabatch.data.rows.ranked import embedding_fault, ranked_of

    group, columns = recipe.embedding, recipe.data.columns

    def check(row: Row) -> None:
        found = ranked_of(row, columns=columns)
        sizes = {"positives": len(found.positives), "negatives": len(found.negatives)}
        if (fault := embedding_fault(group, **sizes, label=found.label)) is not None:
            raise DataError(f"{row.origin}: {fault}")

    return check


def _reranker_check(recipe: Recipe) -> Check:
    """The pointwise loss needs only some query with both kinds of documents, which the whole data shows."""
    from megabatch.data.rows.ranked import NOTHING_TO_COMPARE, ranked_of

    listwise, columns = recipe.reranker.loss_type == "listwise_reranker", recipe.data.columns

    def check(row: Row) -> None:
        if listwise and not ranked_of(row, columns=columns).negatives:
            raise DataError(f"{row.origin}: the query {NOTHING_TO_COMPARE}")

    return check


_FURTHER: Mapping[Rows, Callable[[Recipe], Check]] = {
    "labelled": _label_check,
    "ranked": _embedding_check,
    "candidates": _reranker_check,
    "yes_no": _reranker_check,
}
"""What a task asks of its rows besides their form."""
