"""The rows of several datasets as one sequence: one after the other, or drawn from them at random.

The draws are those of `datasets.interleave_datasets` with the same probabilities, seed and stopping strategy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Literal

import numpy as np

from megabatch.data.rows.files import Line, Row
from megabatch.data.rows.sources import Source
from megabatch.values import dataclass

log = logging.getLogger(__name__)

_DRAWN = 1000
"""Numbers drawn at a time, as `datasets` does: the sequence depends on it."""

Rows = Iterator[Row | Line]


@dataclass(frozen=True, slots=True)
class Mixing:
    """How rows are drawn from datasets."""

    probabilities: tuple[float, ...]
    """Of each dataset; their sum is 1."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """Whether the first dataset that has no further row ends the sequence, or the last one; all others then begin
    again whenever they end."""


def rows_of(sources: Sequence[Source], *, seed: int, shuffle: bool, mixing: Mixing | None = None) -> Rows:
    """The rows of all sources, unparsed; the same ones for the same arguments. Raises: DataError for an empty one.

    Args: `seed` and `shuffle` select the rows of a `#count`; `seed` also decides the draws.
    """
    if mixing is None:
        return chain.from_iterable(source.unparsed(seed=seed, shuffle=shuffle) for source in sources)
    return _mixed([_again(source, seed, shuffle) for source in sources], [s.text for s in sources], mixing, seed)


def _again(source: Source, seed: int, shuffle: bool) -> Callable[[], Rows]:
    return lambda: source.unparsed(seed=seed, shuffle=shuffle)


def _mixed(opened: Sequence[Callable[[], Rows]], names: Sequence[str], mixing: Mixing, seed: int) -> Rows:
    rows = [_Peeked(one()) for one in opened]
    ended, drawn = [False] * len(rows), [0] * len(rows)
    enough = any if mixing.stopping_strategy == "first_exhausted" else all
    for which in _draws(mixing.probabilities, seed):
        yield rows[which].take()
        drawn[which] += 1
        if not rows[which].has_more:
            ended[which] = True
            if enough(ended):
                break
            rows[which] = _Peeked(opened[which]())
    counts = ", ".join(f"{count:,} rows of {name}" for count, name in zip(drawn, names, strict=True))
    log.info("mixed by data.interleave_prob until %s: %s", mixing.stopping_strategy, counts)


def _draws(probabilities: Sequence[float], seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    chances: np.ndarray = np.array(probabilities) / sum(probabilities)
    while True:
        yield from rng.choice(len(chances), size=_DRAWN, p=chances).tolist()


class _Peeked:
    """Rows, and whether there is one more; a source without any row has raised an error by then."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._next: Row | Line | None = next(rows, None)

    @property
    def has_more(self) -> bool:
        return self._next is not None

    def take(self) -> Row | Line:
        taken, self._next = self._next, next(self._rows, None)
        assert taken is not None, "a source has at least one row"
        return taken
