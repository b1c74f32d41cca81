"""The best and worst completions of the newest step of a run, for its page."""

from __future__ import annotations

from pathlib import Path

from megabatch.errors import RewardError
from megabatch.insight import page
from megabatch.insight.masking import Masker
from megabatch.ledger.reader import Reader
from megabatch.ledger.record import Record, best_and_worst
from megabatch.run_directory import RunDirectory

SHOWN = 2
"""Of the best, and of the worst."""
_LONGEST = 1000
"""Characters of a prompt's end and of a completion's beginning."""


def completions(run: Path, label: str, mask: Masker) -> str:
    """A section of the page; empty for a run without a ledger, or whose newest step is damaged."""
    try:
        reader = Reader(RunDirectory(run).ledger)
        step = reader.steps[-1]
        records = reader.records(step)
    except (RewardError, IndexError):
        return ""
    shown = best_and_worst(records, SHOWN)
    header = ("Reward", "Of which", "Tokens", "Prompt", "Completion")
    table = page.table(header, [_row(one, mask) for one in shown], caption=f"Completions of {label}")
    return page.section(f"Best and worst completions of {label} at step {step}", table if shown else "")


def _row(one: Record, mask: Masker) -> tuple[str, ...]:
    rewards = (f"{name} {'-' if value is None else format(value, '.4g')}" for name, value in one.rewards.items())
    return (
        f"{one.reward:.4g}",
        ", ".join(rewards),
        str(len(one.ids)),
        mask.text(one.prompt[-_LONGEST:]),
        mask.text(one.completion[:_LONGEST]),
    )
