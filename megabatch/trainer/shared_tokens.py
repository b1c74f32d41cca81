"""Tokens that sequences of a row have in common, and that stand in it once.

The answers to one prompt start with the same tokens, and in a causal model these have the same keys and values in all
of them. So the first sequence of an item is laid out whole, and every other one goes on from a prefix of it: its
queries are its own tokens, its keys those of the prefix and its own, and its positions count on from the prefix. This
is exact, since nothing but attention looks at other tokens (arXiv:2410.20305, arXiv:2506.05433).

A sequence's own tokens start with the last one of the prompt, which is computed again: it is the position where the
answer's first token is predicted. So each sequence has all of its predictions in its own tokens, and readouts, losses
and columns need not know of shared ones.

S: segments of the row. K: keys that its queries see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Shared:
    """The shared tokens before each segment's own."""

    starts_S: np.ndarray
    """int64: where in the row they start."""
    counts_S: np.ndarray
    """int64: how many they are; 0 for a segment that is whole."""

    def of_each_twice(self) -> Shared:
        """The same for segments that are cut in two."""
        return Shared(self.starts_S.repeat(2), self.counts_S.repeat(2))


def keys_of(starts_S: np.ndarray, counts_S: np.ndarray, shared: Shared | None) -> tuple[np.ndarray, np.ndarray]:
    """How many keys the last query of each segment sees, int64 [S]; and their positions in the row, int64 [K], segment
    by segment.

    Args: starts_S, counts_S: int64: where a segment's own keys start, and how many of them its last query sees.
    """
    if shared is None:
        return counts_S, positions(starts_S, counts_S)
    starts = np.stack([shared.starts_S, starts_S], axis=1).ravel()
    counts = np.stack([shared.counts_S, counts_S], axis=1).ravel()
    return shared.counts_S + counts_S, positions(starts, counts)


def positions(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each run of positions, one run behind the other."""
    return np.repeat(starts - counts.cumsum() + counts, counts) + np.arange(counts.sum())
