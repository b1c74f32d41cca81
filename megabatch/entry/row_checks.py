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
from megabatch.data.rows.prompts import ColumnNames
from megabatch.errors import ConfigError, DataError
from megabatch.tasks import Rows

_TRIED_ROWS = 16
"""Rows of each file that `data.preprocess` is tried on."""
Check = Callable[[Row], object]
"""Raises: DataError with the row's place."""


def row_check(recipe: Recipe, *, kinds: dict[int, Origin] | None = None, names: ColumnNames | None = None) -> Check:
    """The check of the task's rows. Args: kinds: receives what the loss tells apart, and where each kind is first;
    names: what prompts have for rewards."""
    from megabatch.data.rows.contrast import contrast_of  # a dry run reads no data
    from megabatch.data.rows.kinds import READERS

    data, rows = recipe.data, "conversations" if recipe.kind is None else recipe.kind.rows
    read = READERS[rows]
    further = _FURTHER.get(rows)
    check_more = None if further is None else further(recipe)
    made_of, contrast = _made_of(data), contrast_of(recipe)

    def check(row: Row) -> None:
        for made in made_of(row):
            read(made, columns=data.columns, system=data.system)
            if check_more is not None:
                check_more(made)
            if names is not None and rows == "prompts":
                names.add(made, columns=data.columns, system=data.system)
            if kinds is not None and contrast is not None:
                for kind in contrast.kinds(made):
                    kinds.setdefault(kind, made.origin)

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
    from megabatch.data.rows.ranked import NOTHING_TO_COMPARE, candidates_of

    listwise, columns = recipe.reranker.loss_type == "listwise_reranker", recipe.data.columns

    def check(row: Row) -> None:
        if not candidates_of(row, columns=columns).negatives and listwise:
            raise DataError(f"{row.origin}: the query {NOTHING_TO_COMPARE}")

    return check


_FURTHER: Mapping[Rows, Callable[[Recipe], Check]] = {
    "labelled": _label_check,
    "ranked": _embedding_check,
    "candidates": _reranker_check,
    "yes_no": _reranker_check,
}
"""What a task asks of its rows besides their form."""
