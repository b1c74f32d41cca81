"""Samples in the form of a token cache that were never written: those of a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.packing import samples_of
from megabatch.data.tokens.chunk import ChunkArrays


def in_memory(chunks: Sequence[ChunkArrays]) -> TokenCache:
    """The samples of these chunks, concatenated; there may be none."""
    filled = [chunk for chunk in chunks if len(chunk.lengths)]
    sources: dict[tuple[str, bool], int] = {}
    origins = []
    for chunk in filled:
        numbers = np.array([sources.setdefault(file, len(sources)) for file in chunk.files], np.int32)
        origins.append(np.stack([numbers[chunk.origins[:, 0]], chunk.origins[:, 1]], axis=1))
    lengths: np.ndarray = _joined([chunk.lengths for chunk in filled]).astype(np.int64)
    items = _joined([chunk.items for chunk in filled])
    return TokenCache(
        path=Path(),
        ids=_joined([chunk.ids for chunk in filled]),
        weights=_joined([chunk.weights for chunk in filled]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        sums=_joined([chunk.sums for chunk in filled]),
        origins=np.concatenate(origins) if origins else np.zeros((0, 2), np.int32),
        items=np.concatenate([[0], np.cumsum(items, dtype=np.int64)]),
        columns={name: _joined([chunk.columns[name] for chunk in filled]) for name in _names(filled, "columns")},
        token_columns={
            name: _joined([chunk.token_columns[name] for chunk in filled]) for name in _names(filled, "token_columns")
        },
        names={},
        meta={
            "sources": [list(source) for source in sources],
            "max_id": max((int(chunk.ids.max()) for chunk in filled), default=0),
        },
        content="",
    )


def gathered(parts: Sequence[tuple[TokenCache, np.ndarray]]) -> TokenCache:
    """A cache with only these items of each cache, in this order."""
    chunks = []
    for cache, items in parts:
        samples = samples_of(items, cache.items)
        tokens = samples_of(samples, np.concatenate([cache.starts, [len(cache.ids)]]))
        chunks.append(
            ChunkArrays(
                ids=cache.ids[tokens],
                weights=cache.weights[tokens],
                lengths=cache.lengths[samples],
                sums=cache.sums[samples],
                items=np.diff(cache.items)[items],
                origins=cache.origins[samples],
                columns={name: values[samples] for name, values in cache.columns.items()},
                token_columns={name: values[tokens] for name, values in cache.token_columns.items()},
                names={},
                files=[(str(file), bool(is_line)) for file, is_line in cache.meta["sources"]],
                dropped=Counter(),
                remarks=Counter(),
            )
        )
    return in_memory(chunks)


def _names(chunks: Sequence[ChunkArrays], field: str) -> list[str]:
    return list(getattr(chunks[0], field)) if chunks else []


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
