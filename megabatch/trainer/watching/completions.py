"""`grpo.log_completions`: the best and worst completions of each step, from the ledger to a tracker's tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megabatch.errors import RewardError
from megabatch.ledger.reader import Reader
from megabatch.ledger.record import Record, best_and_worst

EACH = 4
"""Of the best, and of the worst: the ledger has the rest."""

Row = dict[str, Any]


def tables(ledger: Path, *, after: int, upto: int) -> Iterator[tuple[int, list[Row]]]:
    """Step and rows of each step in (after, upto] that the ledger has whole; the best completion comes first."""
    try:
        reader = Reader(ledger)
    except RewardError:
        return
    for step in reader.steps:
        if after < step <= upto:
            try:
                yield step, [_row(one) for one in best_and_worst(reader.records(step), EACH)]
            except RewardError:
                continue  # damaged, which `megabatch completions --check` names


def _row(one: Record) -> Row:
    return {
        "key": one.key,
        "prompt": one.prompt,
        "completion": one.completion,
        "reward": one.reward,
        **{f"reward_{name}": value for name, value in one.rewards.items()},
        "advantage": one.advantage,
        "tokens": len(one.ids),
        "finish": one.finish,
    }
