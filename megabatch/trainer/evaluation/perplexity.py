"""Perplexity beside the loss of a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megabatch.trainer.engine import Engine
from megabatch.trainer.steps import Evaluator
from megabatch.trainer.sums import Ratio

_MOST = 700
"""exp of more is beyond any float."""


@dataclass(frozen=True, slots=True)
class WithPerplexity(Evaluator):
    """Adds `perplexity`, exp of the mean of -log p over all tokens of the set that are learned."""

    inner: Evaluator

    def evaluate(self, engine: Engine, *, on_batch: Callable[[], None]) -> Mapping[str, Ratio]:
        found = self.inner.evaluate(engine, on_batch=on_batch)
        nll = found.get("nll", found["loss"])
        known = bool(nll.count) and nll.value < _MOST
        return {**found, "perplexity": Ratio(math.exp(nll.value) if known else 0.0, float(known))}


def with_perplexity(evaluator: Evaluator | None) -> Evaluator | None:
    return None if evaluator is None else WithPerplexity(evaluator)
