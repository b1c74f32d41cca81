"""Rerankers: a score for how well a document fits a query."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.ranked import NOTHING_TO_COMPARE
from megabatch.data.tokens.candidates import FITS
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import open_tokens, steps_of
from megabatch.trainer.evaluation.of_task import of_reranker
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.reranker import Reranker
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.scores import Scores
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Raises: DataError, also where there is nothing to compare."""
    return parts_with(Scores(1), run, source, ranks, busy=busy)


def parts_with(
    readout: Readout, run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]
) -> Parts:
    """Args: readout: where a document's score is read. Raises: as above."""
    group = run.recipe.reranker
    listwise = group.loss_type == "listwise_reranker"
    objective = Reranker(readout, temperature=group.listwise_reranker_temperature if listwise else None)
    tokens = open_tokens(run, source, ranks, busy=busy)
    require_documents_that_do_not_fit(tokens.train, each=listwise)
    steps, evaluator = steps_of(run, ranks, tokens, objective)
    measured = with_measures(evaluator, of_reranker(probable=not listwise))
    return Parts(steps=steps, objective=objective, evaluator=measured, export=export_of(run, source))


def require_documents_that_do_not_fit(data: TokenCache, *, each: bool) -> None:
    """Raises: DataError. Args: each: every query must have one, or else the first without is named."""
    others = np.add.reduceat((data.columns[FITS] == 0).astype(np.int64), data.items[:-1])
    lacking = np.flatnonzero(others == 0)
    if len(lacking) and (each or len(lacking) == len(others)):
        place = data.place(*data.origins[data.items[lacking[0]]].tolist())
        raise DataError(f"{place}: the query {NOTHING_TO_COMPARE} ({len(lacking):,} of {len(others):,} rows)")
