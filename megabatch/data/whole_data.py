"""What a loss asks of its training data as a whole, as tokenised: after rows were dropped."""

from __future__ import annotations

import numpy as np

from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.contrast import contrast_of
from megabatch.data.rows.ranked import NOTHING_TO_COMPARE
from megabatch.data.tokens.candidates import FITS
from megabatch.data.tokens.steps import RIGHT
from megabatch.errors import DataError


def require_contrast(run: RunConfig, data: TokenCache) -> None:
    """Raises: DataError, naming a row, where all samples are of one kind, such as good answers, or a query of a
    listwise reranker has no document that does not fit."""
    contrast = contrast_of(run.recipe)
    if contrast is None:
        return
    kinds = np.unique(_kinds(data))
    if len(kinds) == 1 and not run.only_evaluates:
        raise DataError(f"{data.origin(0)}: {contrast.lacking(int(kinds[0]))}{_dropped(data)}")
    if FITS in data.columns and run.recipe.reranker.loss_type == "listwise_reranker":
        _require_documents(data)


def _kinds(data: TokenCache) -> np.ndarray:
    if RIGHT in data.token_columns:
        return data.token_columns[RIGHT][np.asarray(data.weights) > 0]
    if FITS in data.columns:
        return data.columns[FITS]
    labels = data.columns["label"]
    return labels[data.columns["matched"] > 0] if "matched" in data.columns else labels


def _dropped(data: TokenCache) -> str:
    count = sum(data.dropped.values())
    return f" ({count:,} rows were dropped: {', '.join(data.dropped)})" if count else ""


def _require_documents(data: TokenCache) -> None:
    others = np.add.reduceat((data.columns[FITS] == 0).astype(np.int64), data.items[:-1])
    lacking = np.flatnonzero(others == 0)
    if len(lacking):
        place = data.origin(int(data.items[lacking[0]]))
        raise DataError(f"{place}: the query {NOTHING_TO_COMPARE} ({len(lacking):,} of {len(others):,} rows)")
