"""Synthetic datasets: `example:arithmetic`, small word problems for a first run without a download."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from megabatch.data.rows.files import Origin, Row

DEFAULT_COUNT = 400
"""Number of problems in an example dataset named without `#count`."""
VERSION = 1
"""Increase it when the same name and count give other rows."""

_NAMES = ("Ada", "Bela", "Chen", "Dina", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jun")
_THINGS = ("pears", "stamps", "marbles", "tickets", "candles", "postcards", "seeds", "buttons")


def rows(name: str, count: int | None) -> Iterator[Row]:
    """Problems with `question` and `answer`; the first n do not depend on `count`."""
    draw = random.Random(f"{name}-{VERSION}")
    for number in range(count or DEFAULT_COUNT):
        question, answer = draw.choice(_PROBLEMS)(draw)
        yield Row(Origin(f"example:{name}", number, is_line=False), {"question": question, "answer": answer})


def _gift(draw: random.Random) -> tuple[str, str]:
    giver, taker = draw.sample(_NAMES, 2)
    thing, start, given = draw.choice(_THINGS), draw.randint(20, 90), draw.randint(2, 19)
    return (
        f"{giver} has {start} {thing} and gives {given} of them to {taker}. How many {thing} does {giver} keep?",
        f"{giver} keeps {start} - {given} = {start - given} {thing}.\n#### {start - given}",
    )


def _boxes(draw: random.Random) -> tuple[str, str]:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    boxes, each, loose = draw.randint(2, 9), draw.randint(3, 12), draw.randint(1, 9)
    packed = boxes * each
    return (
        f"{name} packs {thing} into {boxes} boxes of {each} and has {loose} left over. How many {thing} are there?",
        f"The boxes hold {boxes} * {each} = {packed} {thing}. "
        f"With the rest there are {packed} + {loose} = {packed + loose}.\n#### {packed + loose}",
    )


def _sharing(draw: random.Random) -> tuple[str, str]:
    first, second = draw.sample(_NAMES, 2)
    thing, each = draw.choice(_THINGS), draw.randint(3, 30)
    more = draw.randint(1, 9)
    total = 2 * each + more
    return (
        f"{first} and {second} have {total} {thing} together, and {first} has {more} more than {second}. "
        f"How many {thing} does {second} have?",
        f"Without the {more} there are {total} - {more} = {2 * each} {thing}, half of which is {each}.\n#### {each}",
    )


_PROBLEMS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_gift, _boxes, _sharing)
