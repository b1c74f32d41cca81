"""The number of parameters of a model."""

from __future__ import annotations

import functools

from megabatch.plan import weights
from megabatch.plan.shape import ModelShape


@functools.lru_cache(maxsize=64)
def num_parameters(shape: ModelShape) -> int:
    """All weights and biases, tied embeddings counted once, layers of multi-token prediction with the rest."""
    return sum(weight.elements * (weight.experts or 1) * count for weight, count in weights.model(shape))


def num_active_parameters(shape: ModelShape) -> int:
    """Parameters used for one token: of each layer's experts only the chosen ones."""
    chosen = shape.moe_router_topk or 0
    return sum(weight.elements * (chosen if weight.experts else 1) * count for weight, count in weights.model(shape))
