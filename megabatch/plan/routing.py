"""How many tokens the experts of a rank get."""

from __future__ import annotations

from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape

EXPERT_IMBALANCE = 1.5
"""Tokens of the busiest rank over the mean; all ranks wait for that rank. Calibrated (docs/planning.md)."""


def routed_tokens(shape: ModelShape, settings: Settings) -> float:
    """Copies of tokens that the experts of the busiest rank receive from a micro-batch of each of their ranks.

    Each of ep * etp ranks sends moe_router_topk copies of its tokens; they are dealt over ep, and all etp ranks of an
    expert get the same.
    """
    sent = settings.micro_batch_tokens / settings.sp * (shape.moe_router_topk or 0)
    layout = settings.layout
    imbalance = EXPERT_IMBALANCE if layout.ep > 1 else 1.0
    return sent * layout.etp * imbalance
