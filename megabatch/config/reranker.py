"""Rerankers: how a query's documents are compared."""

from __future__ import annotations

from typing import Literal

from megabatch.config.declare import param
from megabatch.values import dataclass

QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""Qwen3-Reranker's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reranker:
    """Training of rerankers (`task_type` reranker and generative_reranker)."""

    loss_type: Literal["pointwise_reranker", "listwise_reranker"] = param("pointwise_reranker")
    """Each document of a query on its own (binary cross-entropy), or the positive one among all of them (softmax)."""
    listwise_reranker_temperature: float = param(1.0, above=0)
    """Scores are divided by it."""
    generative_reranker_positive_token: str = param("yes")
    """Entry of the vocabulary that says that a document fits the query, for `task_type` generative_reranker."""
    generative_reranker_negative_token: str = param("no")
    """The entry that says that it does not."""
    generative_reranker_instruction: str = param(QWEN3_INSTRUCTION)
    """What is asked of a document, in rows whose query has no system turn."""
