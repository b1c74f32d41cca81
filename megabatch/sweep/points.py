"""The points of a sweep: every recipe that it asks for, with its name, or every fault of its declaration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megabatch.config.flags import Named, named, overridden
from megabatch.config.recipe import Recipe
from megabatch.config.rules.fields import invalid_value, mistyped
from megabatch.config.rules.secrets import secrets_of
from megabatch.config.run import save_folder
from megabatch.errors import ConfigError, Fault
from megabatch.sweep.declare import Sweep
from megabatch.sweep.names import run_names, value_text
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its folder."""
    values: Mapping[str, Any]
    """Dotted name → value, of what is swept."""
    recipe: Recipe


def points_of(sweep: Sweep, recipe: Recipe, *, given: Sequence[str] = ()) -> list[Point]:
    """Every point in the order of declaration, the last parameter changing fastest.

    Args: `recipe` is the sweep's own with the command line's flags; `given` are the texts of `--sweep`
    (`parameter=value,value`), which take the place of the sweep's `grid` values or add to them.
    Raises: ConfigError with every unknown name, wrong value, empty list and repetition.
    """
    faults: list[Fault] = []
    base = replace(recipe, checkpoint=replace(recipe.checkpoint, save=str(save_folder(recipe))))
    parts = _parts(sweep, base, given, faults)
    if not faults and not any(parts):
        faults.append(Fault("sweep", None, "has no points: give it grid, zip or list", bare=True))
    if faults:
        raise ConfigError(faults)
    rows = [dict(itertools.chain(*(row.items() for row in rows))) for rows in itertools.product(*filter(None, parts))]
    _refuse_repetitions(rows, base)
    names = run_names(rows)
    return [
        Point(name, values, overridden(base, {"name": f"{recipe.name}-{name}", **values}))
        for name, values in zip(names, rows, strict=True)
    ]


Rows = list[dict[str, Any]]
_MOST = 10_000
"""Points of a sweep: far above what a cluster's queue takes at once. One range too many would keep the launcher busy
for ever."""
_UNSWEPT = ("checkpoint.save", "resources.job_name")
"""Parameters without an effect on a point, which has its folder in the sweep's and its job in an array."""


def _parts(sweep: Sweep, base: Recipe, given: Sequence[str], faults: list[Fault]) -> tuple[Rows, Rows, Rows]:
    """What `zip`, `grid` and `list` ask for, each as rows of dotted names and values."""
    zipped, grid, listed, flags = (_Reader(part, base, faults) for part in ("zip", "grid", "list", "--sweep"))
    for name, values in sweep.grid.items():
        grid.add(name, values)
    for name, values in sweep.zip.items():
        zipped.add(name, values)
    lengths = {name: len(values) for name, values in zipped.columns.items()}
    if len(set(lengths.values())) > 1:
        faults.append(Fault("sweep.zip", lengths, "must have as many values for each parameter"))
    rows = [listed.row(number, row) for number, row in enumerate(sweep.list)]
    for text in given:
        flags.add_text(text)
    fixed = {*zipped.columns, *(name for row in rows for name in row)}
    for name in [*flags.columns, *grid.columns]:
        if name in fixed:
            faults.append(
                Fault(name, None, "is swept twice; a parameter belongs to one of grid, zip, list", bare=True)
            )
    both = grid.columns | flags.columns
    count = math.prod(map(len, both.values())) * max([1, *lengths.values()]) * max(1, len(rows))
    if count > _MOST:
        faults.append(Fault("sweep", None, f"asks for {count:,} runs; it may have {_MOST:,}", bare=True))
        return [], [], rows
    return (
        [dict(zip(lengths, values, strict=False)) for values in zip(*zipped.columns.values(), strict=False)],
        [dict(zip(both, values, strict=True)) for values in itertools.product(*both.values())] if both else [],
        rows,
    )


class _Reader:
    """Reads the names and values of one part of a sweep, and notes what is wrong with them."""

    def __init__(self, part: str, base: Recipe, faults: list[Fault]) -> None:
        self.part, self.base, self.faults = part, base, faults
        self.columns: dict[str, list[Any]] = {}

    def add(self, name: str, values: Any) -> None:
        """A parameter with the list of its values."""
        if not isinstance(values, list | tuple | range):
            self.faults.append(Fault(self._place(name), values, "must be a list of values", try_=_listed(values)))
        elif not values:
            self._fault(name, list(values), "is empty; give at least one value")
        elif len(values) > _MOST:
            self._fault(name, None, f"has {len(values):,} values; a sweep may have {_MOST:,} runs", bare=True)
        elif (found := self._named(name)) is not None:
            typed = [self._typed(name, found, value) for value in values]
            self._put(name, found, typed)

    def add_text(self, text: str) -> None:
        """`parameter=value,value`."""
        name, equals, words = text.partition("=")
        if not equals:
            self.faults.append(
                Fault(f"--sweep {text}", None, "needs values", try_=(f"--sweep {name}=1,2",), bare=True)
            )
        elif (found := self._named(name)) is not None:
            try:
                values = found.values(words)
            except ValueError as error:
                self._fault(name, words, f"{error}; separate values by commas, or give a JSON array")
                return
            if not values:
                self._fault(name, words, "is empty; give at least one value")
            for value in values:
                self._check(name, found, value)
            self._put(name, found, values)

    def row(self, number: int, row: Any) -> dict[str, Any]:
        """One entry of `list`."""
        values: dict[str, Any] = {}
        for name, value in row.items():
            if (found := self._named(name)) is None:
                continue
            dotted = found.parameter.dotted
            if dotted in values:
                place = f"sweep.list[{number}][{name!r}]"
                self.faults.append(Fault(place, None, f"is given twice: it is {dotted}", bare=True))
            values[dotted] = self._typed(name, found, value)
        return values

    def _put(self, name: str, found: Named, values: list[Any]) -> None:
        if found.parameter.dotted in self.columns:
            self._fault(name, None, f"is given twice: it is {found.parameter.dotted}", bare=True)
        self.columns[found.parameter.dotted] = values

    def _named(self, name: str) -> Named | None:
        found = named(name, self.base)
        if isinstance(found, Named) and found.parameter.dotted not in _UNSWEPT:
            return found
        if isinstance(found, Named) or f"--{name}" in map(str, found.try_):
            self._fault(name, None, "cannot be swept: it is of the whole sweep", bare=True)
            return None
        near = [str(one).removeprefix("--") for one in found.try_]
        self.faults.append(replace(found, field=self._place(name), try_=near))
        return None

    def _typed(self, name: str, found: Named, value: Any) -> Any:
        try:
            value = found.typed(value)
        except ValueError:
            given = tuple(value) if isinstance(value, list) else value
            self.faults.append(replace(mistyped(found.parameter, given), field=self._place(name)))
            return value
        self._check(name, found, value)
        return value

    def _check(self, name: str, found: Named, value: Any) -> None:
        """Range and form; what depends on other parameters is a matter of each point."""
        for fault in invalid_value(found.parameter, value):
            self.faults.append(replace(fault, field=self._place(name)))
        for kind in secrets_of(value):  # before the table or a folder's name could show it
            rule = f"holds {kind}, but others can read tables, folders and run.json; export it in the submitting shell"
            self._fault(name, None, f"{rule} instead", bare=True)

    def _fault(self, name: str, value: Any, rule: str, *, bare: bool = False) -> None:
        self.faults.append(Fault(self._place(name), value, rule, bare=bare))

    def _place(self, name: str) -> str:
        return f"--sweep {name}" if self.part == "--sweep" else f"sweep.{self.part}[{name!r}]"


def _listed(values: Any) -> tuple[str, ...]:
    """How to write what holds values and is no list."""
    if callable(getattr(values, "tolist", None)):
        return ("its .tolist()",)
    return ("list(…) of it",) if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping) else ()


def _refuse_repetitions(rows: Rows, base: Recipe) -> None:
    """Two points that ask for the same run. Raises: ConfigError with all of them."""
    swept = sorted({name for row in rows for name in row})
    declared = {name: _value(base, name) for name in swept}
    first: dict[Any, int] = {}
    faults = []
    for index, row in enumerate(rows):
        key = tuple(_key((declared | row)[name]) for name in swept)
        before = first.setdefault(key, index)
        if before != index:
            values = ", ".join(f"{name}={value_text(value)}" for name, value in (declared | row).items())
            rule = f"are the same run ({values or 'the recipe itself'}); leave one of them out"
            faults.append(Fault(f"points {before + 1} and {index + 1}", None, rule, bare=True))
    if faults:
        raise ConfigError(faults)


def _value(recipe: Recipe, dotted: str) -> Any:
    group, _, name = dotted.partition(".")
    return getattr(getattr(recipe, group), name)


def _key(value: Any) -> Any:
    """Equal for equal values, whatever way a number is spelled, and hashable."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _key(item)) for key, item in value.items()))
    if isinstance(value, tuple):
        return tuple(_key(item) for item in value)
    return (isinstance(value, bool), value)


def swept(points: Sequence[Point]) -> Iterator[str]:
    """Dotted names of what differs between the points' declarations."""
    yield from dict.fromkeys(name for point in points for name in point.values)
