"""Reads a run's ledger: the completions of each step of its final history, and whether any is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megabatch.errors import RewardError
from megabatch.ledger.record import Record, decode
from megabatch.ledger.segments import Frame, frames, segments
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What a ledger has."""

    steps: tuple[int, ...]
    completions: int
    absent: tuple[int, ...]
    """Steps between the first and the last that it lacks."""
    damaged: tuple[int, ...]
    """Steps whose bytes do not match their checksum."""
    repeated: tuple[str, ...]
    """step/key of completions that a step has more than once."""
    bytes: int

    def __str__(self) -> str:
        if not self.steps:
            return "no steps"
        faults = [
            f"{len(found)} {what} (first: {found[0]})"
            for what, found in (
                ("steps absent", self.absent),
                ("steps damaged", self.damaged),
                ("completions twice", self.repeated),
            )
            if found
        ]
        return (
            f"steps {self.steps[0]} to {self.steps[-1]}, {self.completions} completions, "
            f"{self.bytes / 2**20:.1f} MiB, {', '.join(faults) or 'none absent or twice'}"
        )


class Reader:
    """A ledger as it is now; a running writer does not disturb it."""

    def __init__(self, folder: Path) -> None:
        """Raises: RewardError if there is no ledger."""
        self._files = segments(folder)
        if not self._files:
            raise RewardError(f"{folder} has no completions; a run that generates writes them after its first step")
        self._frames = _final(self._files)

    @property
    def steps(self) -> tuple[int, ...]:
        """In order."""
        return tuple(self._frames)

    def records(self, step: int) -> tuple[Record, ...]:
        """Raises: RewardError naming what is there, if this step is not, or is damaged."""
        if step not in self._frames:
            raise RewardError(f"step {step} is not in the ledger, which has steps {_ranges(self.steps)}")
        content = self._frames[step].content()
        if content is None:
            raise RewardError(f"step {step} of {self._frames[step].file} is damaged: its checksum differs")
        return tuple(decode(content))

    def account(self) -> Account:
        """Reads everything."""
        damaged, repeated, completions = [], [], 0
        for step, frame in self._frames.items():
            content = frame.content()
            if content is None:
                damaged.append(step)
                continue
            seen: set[str] = set()
            for record in decode(content):
                completions += 1
                if record.key in seen:
                    repeated.append(f"{step}/{record.key}")
                seen.add(record.key)
        steps = self.steps
        every = range(steps[0], steps[-1] + 1) if steps else range(0)
        return Account(
            steps=steps,
            completions=completions,
            absent=tuple(step for step in every if step not in self._frames),
            damaged=tuple(damaged),
            repeated=tuple(repeated),
            bytes=sum(file.stat().st_size for file in self._files),
        )


def _final(files: list[Path]) -> dict[int, Frame]:
    """By step; a frame replaces earlier frames of its step and of later ones, which a resume went back behind."""
    found: dict[int, Frame] = {}
    for frame in _all(files):
        while found and (last := next(reversed(found))) >= frame.step:
            del found[last]
        found[frame.step] = frame
    return found


def _all(files: list[Path]) -> Iterator[Frame]:
    for file in files:
        try:
            yield from frames(file)
        except FileNotFoundError:
            continue  # a writer has just deleted its oldest


def _ranges(steps: tuple[int, ...]) -> str:
    """`1 to 5, 8`."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1][1:] = [step]
        else:
            parts.append([step])
    return ", ".join(" to ".join(map(str, part)) for part in parts) or "none"
