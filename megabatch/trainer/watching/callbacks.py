"""A user's own classes, told of what the run does; on the main rank alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megabatch.callbacks import load
from megabatch.errors import MegabatchError
from megabatch.trainer.activity import Activity
from megabatch.trainer.ranks import Ranks
from megabatch.user_code import split
from megabatch.user_error import describe_error


class Callbacks:
    """A run's callbacks, called in order with plain values."""

    def __init__(self, named: Sequence[str], ranks: Ranks, activity: Activity) -> None:
        """Collective. Raises: ConfigError on every rank for a callback that cannot be used."""
        self._activity = activity
        self._all: list[tuple[str, Any]] = []
        error: MegabatchError | None = None
        try:
            if ranks.is_main:
                self._all = [(text, load(text)) for text in named]
        except MegabatchError as e:
            error = e
        if named:
            ranks.raise_together(error)

    def call(self, hook: str, step: int, **values: Any) -> None:
        """Raises: MegabatchError with the line, where a callback raises."""
        for text, callback in self._all:
            method = getattr(callback, hook, None)
            if method is None:
                continue
            file, name = split(text)
            self._activity.at(f"in callback {name}.{hook}", step)  # a watcher of the run names it, should it hang
            try:
                method(step=step, **values)
            except Exception as e:
                raise MegabatchError(f"callback {name}.{hook} of step {step} failed: {describe_error(e, file)}") from e
