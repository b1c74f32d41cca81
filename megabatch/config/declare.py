"""Declaring a parameter once, and reading the declarations back.

A parameter is a field of a group (a frozen dataclass such as `Parallel`): its annotation is the type, `param` holds
the default and what only a program needs to know, and the docstring beneath it is its meaning. Flags, help, checks
and `docs/parameters.md` are all derived from these.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from megabatch.values import dataclass

T = TypeVar("T")
_FACTS = "megabatch"
MOST_RANKS = 1 << 20
"""Upper limit for counts of ranks, GPUs and nodes: more than any cluster has, and few enough to look for divisors."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a declaration says besides name, type, default and meaning."""

    built: bool | tuple[Any, ...]
    """True: every value works. False: only the default does. A tuple: these values and the default do."""
    refused: str | None
    """Why the other values are refused, where that is known; None: they are to be built."""
    speed_only: bool
    """Changes speed or memory, never the numbers; the trainer says so once where it has no effect."""
    aliases: tuple[str, ...]
    negated_aliases: tuple[str, ...]
    """Other names with the opposite meaning: `rope_fusion` for `no_rope_fusion`."""
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None

    def allows(self, number: float) -> bool:
        return not (
            (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )

    def limits(self) -> str:
        """The range in words: `at least 1`, `above 0 and at most 1`, or nothing."""
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


def param(
    default: T,
    *,
    built: bool | tuple[Any, ...] = True,
    refused: str | None = None,
    speed_only: bool = False,
    aliases: tuple[str, ...] = (),
    negated_aliases: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> T:
    """Declares a field of a group; see `Facts` for the arguments."""
    facts = Facts(built, refused, speed_only, aliases, negated_aliases, at_least, above, at_most, below)
    return typing.cast(T, dataclasses.field(default=default, metadata={_FACTS: facts}))


def freeze_lists(group: Any) -> None:
    """Stores the lists that a group was given as tuples; the `__post_init__` of groups with list-valued fields."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, list):
            object.__setattr__(group, field.name, tuple(value))


@dataclass(frozen=True, slots=True)
class Parameter:
    """One declared parameter."""

    group: str
    """Field of the recipe that holds it: `parallel`."""
    name: str
    hint: Any
    """The declared type, resolved: `int | None`, `Literal['adam', 'sgd']`, `Sequence[str]`."""
    default: Any
    facts: Facts

    @property
    def dotted(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def state(self) -> str:
        """`built`, `speed only`, `not built yet`, the values that are built, or why others are refused."""
        if isinstance(self.facts.built, tuple):
            why = f" (others refused: {self.facts.refused})" if self.facts.refused else ""
            return f"built: {', '.join(map(str, self.facts.built))}{why}"
        if not self.facts.built:
            return f"refused: {self.facts.refused}" if self.facts.refused else "not built yet"
        return "speed only" if self.facts.speed_only else "built"

    def unbuilt(self, value: Any) -> tuple[Any, ...]:
        """The parts of `value` that are not built yet: the value itself, or the elements of a list-valued one."""
        built = self.facts.built
        if built is True or value == self.default:
            return ()
        allowed = (self.default,) if built is False else (self.default, *built)
        if isinstance(value, tuple) and isinstance(built, tuple):
            return tuple(item for item in value if item not in built)
        return () if any(value == item and type(value) is type(item) for item in allowed) else (value,)


@functools.cache
def group_types(recipe_type: type) -> Mapping[str, type]:
    """Group name → dataclass, for each field of a recipe that is a group, in declaration order."""
    hints = typing.get_type_hints(recipe_type)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(recipe_type)
        if dataclasses.is_dataclass(hints[field.name])
    }


@functools.cache
def parameters(recipe_type: type) -> tuple[Parameter, ...]:
    """Every parameter of a recipe, in declaration order."""
    found: list[Parameter] = []
    for group, group_type in group_types(recipe_type).items():
        hints = typing.get_type_hints(group_type)
        for field in dataclasses.fields(group_type):
            found.append(Parameter(group, field.name, hints[field.name], field.default, field.metadata[_FACTS]))
    return tuple(found)


def named(found: Sequence[Parameter], name: str) -> tuple[Parameter, ...]:
    """The parameters of that flat name: several for `beta` and `loss_type`, which belong to each algorithm."""
    return tuple(parameter for parameter in found if parameter.name == name)
