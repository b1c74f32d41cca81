"""Synthetic datasets: small word problems for a first run without a download.

| name | a row |
| --- | --- |
| `example:arithmetic` | a problem with its solution |
| `example:arithmetic_pairs` | the same, and a wrong solution: another operation, or a slip in the last line |
| `example:arithmetic_labels` | a problem with a right or a wrong solution, and which it is |
| `example:arithmetic_steps` | a problem with the steps of a solution, and which of them are right |
| `example:arithmetic_ranked` | a problem, its solution, and as negatives two wrong ones and six of others |
| `example:hasty_sums` | the sum of three digits: `solution` is right, most `answer`s leave the last digit out |
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from megabatch.data.rows.files import Origin, Row

DEFAULT_COUNT = 400
"""Number of problems in an example dataset named without `#count`."""
VERSION = 1
"""Increase it when the same name and count give other rows."""

_NAMES = ("Ada", "Bela", "Chen", "Dina", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jun")
_THINGS = ("pears", "stamps", "marbles", "tickets", "candles", "postcards", "seeds", "buttons")


class _Problem(NamedTuple):
    question: str
    answer: str
    wrong: tuple[str, str]
    """The same with another operation, and with a slip."""


def rows(name: str, count: int | None) -> Iterator[Row]:
    """Problems with `question` and `answer`; the first n do not depend on `count`."""
    draw = random.Random(f"{name}-{VERSION}")
    if name == "hasty_sums":
        yield from _hasty_sums(draw, count or DEFAULT_COUNT)
        return
    if name == "arithmetic_ranked":
        yield from _ranked(draw, count or DEFAULT_COUNT)
        return
    if name == "arithmetic_steps":
        yield from _stepwise(draw, count or DEFAULT_COUNT)
        return
    for number in range(count or DEFAULT_COUNT):
        problem = draw.choice(_PROBLEMS)(draw)
        yield Row(Origin(f"example:{name}", number, is_line=False), _fields(name, problem, draw))


def _fields(name: str, problem: _Problem, draw: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"question": problem.question, "answer": problem.answer}
    if name == "arithmetic_pairs":
        fields["rejected_response"] = draw.choice(problem.wrong)
    elif name == "arithmetic_labels":
        fields["label"] = draw.random() < 0.5
        fields["answer"] = problem.answer if fields["label"] else draw.choice(problem.wrong)
    return fields


def _ranked(draw: random.Random, count: int) -> Iterator[Row]:
    """Solutions of other problems are drawn for each row, so that no row depends on how many there are."""
    for number in range(count):
        problem = draw.choice(_PROBLEMS)(draw)
        others = [draw.choice(_PROBLEMS)(draw).answer for _ in range(_OTHERS)]
        fields = {"query": problem.question, "positive": problem.answer, "negatives": [*problem.wrong, *others]}
        yield Row(Origin("example:arithmetic_ranked", number, is_line=False), fields)


_OTHERS = 6


def _stepwise(draw: random.Random, count: int) -> Iterator[Row]:
    """Two of three solutions go wrong at some step, by another operation or, less often, a slip; no step behind is
    right."""
    for number in range(count):
        name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
        boxes, each, given, found = (draw.randint(*limits) for limits in ((3, 9), (4, 12), (2, 9), (2, 9)))
        question = (
            f"{name} buys {boxes} boxes of {each} {thing}, gives {given} away and finds {found}. "
            f"How many {thing} does {name} have?"
        )
        said = (
            ("The boxes hold", "*", each),
            (f"Without {given} there are", "-", given),
            ("Then there are", "+", found),
        )
        wrong = draw.randrange(len(said)) if draw.random() < _WRONG else len(said)
        steps, value = [], boxes
        for place, (words, right, by) in enumerate(said):
            slip = draw.choice((-1, 1)) if place == wrong and draw.random() < _SLIPS else 0
            sign = _OTHER[right] if place == wrong and not slip else right
            before, value = value, _COMPUTED[sign](value, by) + slip
            steps.append(f"{words} {before} {sign} {by} = {value} {thing}.")
        labels = [place < wrong for place in range(len(said))]
        fields = {"prompt": question, "completions": [*steps, f"#### {value}"], "labels": [*labels, all(labels)]}
        yield Row(Origin("example:arithmetic_steps", number, is_line=False), fields)


_OTHER = {"*": "+", "-": "+", "+": "-"}
_COMPUTED: Mapping[str, Callable[[int, int], int]] = {"*": operator.mul, "-": operator.sub, "+": operator.add}
_WRONG, _SLIPS = 2 / 3, 1 / 4


def _hasty_sums(draw: random.Random, count: int) -> Iterator[Row]:
    """Each of the 1,000 sums once, in an order of its own, then again."""
    order = draw.sample(range(1000), 1000)
    for number in range(count):
        digits = [order[number % 1000] // place % 10 for place in (100, 10, 1)]
        said = digits[:2] if draw.random() < _HASTE else digits
        fields = {"question": "Add {}, {} and {}.".format(*digits), "answer": str(sum(said))}
        yield Row(Origin("example:hasty_sums", number, is_line=False), {**fields, "solution": str(sum(digits))})


_HASTE = 0.6


def _gift(draw: random.Random) -> _Problem:
    giver, taker = draw.sample(_NAMES, 2)
    thing, start, given = draw.choice(_THINGS), draw.randint(20, 90), draw.randint(2, 19)

    def solved(sign: str, left: int) -> str:
        return f"{giver} keeps {start} {sign} {given} = {left} {thing}.\n#### {left}"

    return _Problem(
        f"{giver} has {start} {thing} and gives {given} of them to {taker}. How many {thing} does {giver} keep?",
        solved("-", start - given),
        (solved("+", start + given), solved("-", start - given + 1)),
    )


def _boxes(draw: random.Random) -> _Problem:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    boxes, each, loose = draw.randint(2, 9), draw.randint(3, 12), draw.randint(1, 9)

    def solved(sign: str, packed: int, slip: int = 0) -> str:
        return (
            f"The boxes hold {boxes} {sign} {each} = {packed} {thing}. "
            f"With the rest there are {packed} + {loose} = {packed + loose + slip}.\n#### {packed + loose + slip}"
        )

    return _Problem(
        f"{name} packs {thing} into {boxes} boxes of {each} and has {loose} left over. How many {thing} are there?",
        solved("*", boxes * each),
        (solved("+", boxes + each), solved("*", boxes * each, slip=1)),
    )


def _sharing(draw: random.Random) -> _Problem:
    first, second = draw.sample(_NAMES, 2)
    thing, each = draw.choice(_THINGS), draw.randint(3, 30)
    more = draw.randint(1, 9)
    total = 2 * each + more

    def solved(sign: str, left: int, half: int) -> str:
        without = f"Without the {more} there are {total} {sign} {more} = {left} {thing}"
        return f"{without}, half of which is {half}.\n#### {half}"

    return _Problem(
        f"{first} and {second} have {total} {thing} together, and {first} has {more} more than {second}. "
        f"How many {thing} does {second} have?",
        solved("-", 2 * each, each),
        (solved("+", 2 * (each + more), each + more), solved("-", 2 * each, each + 1)),
    )


_PROBLEMS: tuple[Callable[[random.Random], _Problem], ...] = (_gift, _boxes, _sharing)
