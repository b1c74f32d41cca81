"""How rewards of GRPO are computed, beside their names and weights in `grpo`."""

from __future__ import annotations

from dataclasses import dataclass

from megabatch.config.declare import param

SHIPPED = ("accuracy", "format", "cosine", "repetition", "soft_overlong")
"""Rewards that `reward_funcs` may name besides functions of users."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Processes that compute rewards."""

    reward_workers: int = param(4, at_least=1)
    """Processes beside rank 0 that compute rewards."""
    reward_timeout_s: float = param(60.0, above=0)
    """Seconds that a call of a reward may take; its samples are then tried one by one, each with the same limit."""
