"""Errors that reach a user, and the faults of a configuration.

A fault names the place (`dotted.field=value`), the rule with the other side's value, and a fix. Every rule runs
before a `ConfigError` is raised, so a user sees all faults at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from megabatch.secret_text import masked
from megabatch.values import dataclass

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def printable(text: str) -> str:
    """Text with the characters that control a terminal escaped, all but line ends and tabs."""
    return text if text.isprintable() else _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class MegabatchError(Exception):
    """Base of every error that megabatch raises on purpose; its text is one clear message with the fix, without what
    controls a terminal, which names of files and tensors may hold."""

    def __str__(self) -> str:
        return printable(super().__str__())


class LaunchError(MegabatchError):
    """Submission, Slurm or a job's state."""


class DataError(MegabatchError):
    """A dataset, template or tokenizer; the text names file and line."""


class ConversionError(MegabatchError):
    """A tensor that cannot be mapped, read or written; the text names tensor, shapes, dtypes and mapping entry."""


class CheckpointError(MegabatchError):
    """A checkpoint that cannot be saved or restored."""


class RolloutError(MegabatchError):
    """A rollout engine that cannot be reached, generate, or take weights."""


class RewardError(MegabatchError):
    """A reward that cannot be computed; the text names the reward and the sample."""


class ElsewhereError(MegabatchError):
    """Another rank of the run failed; its own log has the cause."""

    def __init__(self, error: MegabatchError, rank: int = 0) -> None:
        self.error, self.rank = error, rank
        super().__init__(f"rank {rank} failed: {error}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.error, self.rank)  # pickle would pass the text alone


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken rule of a configuration."""

    field: str
    """Dotted name, for example `parallel.expert_model_parallel_size`."""
    value: Any
    """What the user set; shown as `field=value`. None together with `bare` shows the field alone."""
    rule: str
    """What must hold, with the other side's value."""
    try_: Sequence[Any] = ()
    """Values that would pass, nearest first."""
    bare: bool = False
    """Show the field without `=value` (unknown names, missing values)."""

    def __str__(self) -> str:
        place = self.field if self.bare else f"{self.field}={self.value!r}"
        fix = f"; try {' or '.join(str(x) for x in self.try_)}" if self.try_ else ""
        return printable(masked(f"{place} {self.rule}{fix}")).replace("\n", "\\n")  # one line, whatever a name holds


class ConfigError(MegabatchError):
    """One or more faults of a configuration, all reported together."""

    def __init__(self, faults: Iterable[Fault] | str) -> None:
        self.faults: tuple[Fault, ...] = () if isinstance(faults, str) else tuple(faults)
        super().__init__(faults if isinstance(faults, str) else self._text())

    def _text(self) -> str:
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        return "\n  ".join([f"{count}, nothing was started", *map(str, self.faults)])
