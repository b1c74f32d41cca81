"""Which prompts are drawn for which round, and how many rounds are begun ahead of the one that is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megabatch.data.schedule import Cursor, Schedule
from megabatch.trainer.rl.ahead import Draws, Lead
from megabatch.trainer.rl.prompts import Prompt
from megabatch.trainer.rl.steps import Place

SCHEDULE = Schedule(np.full(10, 5), global_batch_size=3, seed=1)


class Prompts:
    """Ten of them."""

    def draw(self, schedule: Schedule, cursor: Cursor) -> tuple[list[Prompt], Cursor]:
        packs, after = schedule.next(cursor)
        return [Prompt(int(pack), (int(pack),), f"rows:{pack}") for pack in packs], after


class Begun:
    """What a generator was asked to begin, by name."""

    def __init__(self) -> None:
        self.prompts: dict[str, list[int]] = {}

    def begin(self, prompts: Prompts, drawn: list[Prompt], *, each: int, name: str) -> None:
        assert each == 4
        found = [one.index for one in drawn]
        assert self.prompts.setdefault(name, found) == found, "a round has the same prompts whenever it is begun"


def lead(rounds: int, total: int = 6) -> tuple[Lead, Begun]:
    begun: Any = Begun()
    prompts: Any = Prompts()
    found = Lead(rounds=rounds, total=total, each=4, prompts=prompts, schedule=SCHEDULE, generator=begun)
    return found, begun


def sequence(rounds: int, *, total: int = 6) -> list[list[int]]:
    """The prompts of each round without anything ahead."""
    found, cursor = [], Cursor()
    for _ in range(total):
        drawn, cursor = Prompts().draw(SCHEDULE, cursor)
        found.append([one.index for one in drawn])
    return found


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("resumes", [False, True])
def test_every_round_has_the_prompts_that_it_would_have_without_a_lead(rounds: int, resumes: bool) -> None:
    """In a run that resumes before every round too: nothing is lost or drawn twice."""
    ahead, begun = lead(rounds)
    draws, trained = Draws(), []
    for number in range(6):
        if resumes:
            place = Place.from_json(Place(draws, number, form="3x4/1").to_json())
            draws, (ahead, begun) = place.prompts, lead(rounds)
        draws = ahead.begin(number, draws)
        last = min(number + rounds, 5)
        assert sorted(map(int, begun.prompts))[-1] == last, "and none after the last round of the run"
        assert len(draws.begun) == last - number + 1
        drawn, draws = draws.first(Prompts(), SCHEDULE)  # type: ignore[arg-type]
        assert begun.prompts[str(number)] == [one.index for one in drawn]
        assert draws.epoch(SCHEDULE) == pytest.approx(3 * (number + 1) / 10)
        trained.append([one.index for one in drawn])
    assert trained == sequence(rounds)
    assert draws.begun == ()


def test_prompts_that_are_drawn_again_come_after_those_that_were_begun() -> None:
    """`dynamic_sample` fills up a round while others are generated."""
    ahead, _ = lead(1)
    draws = ahead.begin(0, Draws())
    drawn = [[]] * 3
    drawn[0], draws = draws.first(Prompts(), SCHEDULE)  # type: ignore[arg-type]
    drawn[2], draws = draws.more(Prompts(), SCHEDULE)  # type: ignore[arg-type]
    drawn[1], draws = draws.first(Prompts(), SCHEDULE)  # type: ignore[arg-type]
    assert [[one.index for one in some] for some in drawn] == sequence(1, total=3)


def test_a_run_without_a_lead_first_trains_on_what_was_begun() -> None:
    ahead, _ = lead(2)
    draws = ahead.begin(0, Draws())
    found = []
    for _ in range(6):
        drawn, draws = draws.first(Prompts(), SCHEDULE)  # type: ignore[arg-type]
        found.append([one.index for one in drawn])
    assert found == sequence(0)


def test_a_cursor_without_a_lead_is_a_plain_one() -> None:
    assert Draws(Cursor(1, 2, "x")).to_json() == Cursor(1, 2, "x").to_json()
