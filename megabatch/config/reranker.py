"""Rerankers: how a query's documents are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megabatch.config.declare import param


@dataclass(frozen=True, kw_only=True, slots=True)
class Reranker:
    """Training of rerankers (`task_type` reranker)."""

    loss_type: Literal["pointwise_reranker", "listwise_reranker"] = param("pointwise_reranker")
    """Each document of a query on its own (binary cross-entropy), or the positive one among all of them (softmax)."""
    listwise_reranker_temperature: float = param(1.0, above=0)
    """Scores are divided by it."""
