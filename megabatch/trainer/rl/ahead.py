"""Rounds that are begun before they are trained on (`async_generate`), and where their prompts were drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megabatch.data.schedule import Cursor, Schedule
from megabatch.trainer.rl.generating import Generator
from megabatch.trainer.rl.prompts import Prompt, Prompts


@dataclass(frozen=True, slots=True)
class Draws:
    """Where the prompts of coming rounds are drawn; saved in checkpoints."""

    next: Cursor = field(default_factory=Cursor)
    """Of those that are not drawn yet."""
    begun: tuple[Cursor, ...] = ()
    """Of each round that was begun and has no completions yet, the next to train on first."""

    def first(self, prompts: Prompts, schedule: Schedule) -> tuple[list[Prompt], Draws]:
        """The prompts of the next round to train on."""
        if self.begun:
            drawn, _ = prompts.draw(schedule, self.begun[0])
            return drawn, Draws(self.next, self.begun[1:])
        return self.more(prompts, schedule)

    def more(self, prompts: Prompts, schedule: Schedule) -> tuple[list[Prompt], Draws]:
        """Prompts that were not drawn before."""
        drawn, after = prompts.draw(schedule, self.next)
        return drawn, Draws(after, self.begun)

    def epoch(self, schedule: Schedule) -> float:
        """Passes over the prompts, without those that were begun."""
        begun = len(self.begun) * schedule.global_batch_size
        return self.next.epoch + (self.next.offset - begun) / len(schedule)

    def to_json(self) -> dict[str, Any]:
        """A plain cursor where nothing is begun."""
        begun = {"begun": [cursor.to_json() for cursor in self.begun]} if self.begun else {}
        return {**self.next.to_json(), **begun}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Draws:
        """Raises: DataError."""
        return cls(Cursor.from_json(saved), tuple(Cursor.from_json(one) for one in saved.get("begun", ())))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lead:
    """How far generation is ahead of training."""

    rounds: int
    """`max_staleness`: rounds that are begun beside the one that is trained on."""
    total: int
    """Rounds of the run: none is begun for nothing."""
    each: int
    """Completions of a prompt."""
    prompts: Prompts
    schedule: Schedule
    generator: Generator

    def begin(self, number: int, draws: Draws) -> Draws:
        """Has the round `number`, the next to train on, and those after it generated."""
        while len(draws.begun) < min(self.rounds + 1, self.total - number):
            _, after = draws.more(self.prompts, self.schedule)
            draws = Draws(after.next, (*draws.begun, draws.next))
        self.begin_again(number, draws)
        return draws

    def begin_again(self, number: int, draws: Draws) -> None:
        """Has the rounds generated that were begun before, unless they are already; after a resume with the same
        prompts, keys and seeds. Args: `number`: of the first of them."""
        for place, cursor in enumerate(draws.begun):
            drawn, _ = self.prompts.draw(self.schedule, cursor)
            self.generator.begin(self.prompts, drawn, each=self.each, name=f"{number + place}")
