"""Whether a model has an embedding for every token of its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.tokens import tokenizer
from megabatch.errors import DataError

_BLOCK = 1 << 22  # tokens compared at a time


def require_known_ids(cache: TokenCache, *, rows: int, folder: Path) -> None:
    """Checks that the model's embedding has a row for every id in the samples; unused tokenizer ids may lie above.

    It costs nothing unless it fails, since the cache knows its largest id.

    Args: `rows`: those of the model's embedding without padding; `folder`: the tokenizer's.
    Raises: DataError naming the first such token, its place, and how many samples contain one.
    """
    if cache.max_id < rows:
        return
    places = np.concatenate(list(_above(cache, rows)))
    first = int(places[0])
    number = int(cache.ids[first])
    samples = np.unique(np.searchsorted(cache.starts, places, side="right") - 1)
    token = tokenizer.load(folder).convert_ids_to_tokens(number)
    more = f" ({len(samples):,} samples contain such tokens)" if len(samples) > 1 else ""
    raise DataError(
        f"{cache.origin(int(samples[0]))}: contains the token {token!r} with id {number}, and the model's embedding "
        f"has {rows} rows{more}; use the model's own tokenizer, remove the token from the data, or resize "
        f"the embedding to at least {cache.max_id + 1} rows"
    )


def _above(cache: TokenCache, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, len(cache.ids), _BLOCK):
        yield np.flatnonzero(cache.ids[start : start + _BLOCK] >= rows) + start
