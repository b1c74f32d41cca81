"""Reading a resolved run: what was left out of the recipe has been filled in, and nobody falls back again."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def resolved(value: T | None) -> T:
    """A value that may be missing in a recipe and never in `run.json` (see `config.run`)."""
    assert value is not None, "config.run derives it; a resolved run has it"
    return value
