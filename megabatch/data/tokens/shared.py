"""How many tokens the samples of an item start with in common, which a row may hold once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megabatch.data.tokens.sample import Item

SHARED = "shared"
"""The column with the number of these tokens; 0 in an item's first sample, which has them."""


def with_shared(item: Item) -> Item:
    """The item whose samples have the column `SHARED`."""
    count = in_common([sample.ids for sample in item], [sample.weights for sample in item])
    return [
        sample._replace(columns={**sample.columns, SHARED: float(count if number else 0)})
        for number, sample in enumerate(item)
    ]


def in_common(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> int:
    """The largest number of first tokens that are the same in all samples, and before a token that none of them
    learns: it comes first where the others are left out, and nothing predicts the first.

    Args: ids int32 [n], weights float32 [n] of each sample.
    """
    shortest = min(len(one) for one in ids)
    differs: np.ndarray = np.zeros(shortest, np.bool_)
    for one, its_weights in zip(ids, weights, strict=True):
        differs |= (one[:shortest] != ids[0][:shortest]) | (its_weights[:shortest] != 0)
    same = int(differs.argmax()) if differs.any() else shortest
    return max(same - 1, 0)
