"""Which engine generates which requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def dealt(prompts: Sequence[tuple[int, ...]], engines: int) -> list[list[int]]:
    """Positions of each engine's requests: those of one prompt stay together, because engines share what they computed
    of it, unless there are fewer prompts than engines."""
    groups = [[index for index, _ in group] for _, group in groupby(enumerate(prompts), key=lambda one: one[1])]
    if len(groups) < engines:
        groups = [[index] for index in range(len(prompts))]
    shares: list[list[int]] = [[] for _ in range(engines)]
    for number, group in enumerate(groups):
        shares[number % engines] += group
    return shares
