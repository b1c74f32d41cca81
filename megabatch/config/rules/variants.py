"""Rules that need not look again at a recipe which differs from one that they have seen in a few groups alone.

While a rule looks at the first recipe, the groups that it reads are noted, and whether it reads the layout's sizes. A
variant in which these are the same is judged the same: the rule would take the same way through its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

from megabatch.config.layout import layout_of
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

Rule = Callable[[Recipe, ModelShape | None, Layout | None], Iterator[Fault]]
_PARTS = tuple(field.name for field in fields(Recipe))
_LAYOUT, _ANY = "the layout", "anything"


@dataclass(frozen=True, slots=True)
class _Seen:
    """A rule with what it read of the first recipe, and what it found."""

    rule: Rule
    reads: frozenset[str]
    faults: tuple[Fault, ...]


class Seen:
    """What the rules found in a recipe, for its variants."""

    def __init__(self, recipe: Recipe, shape: ModelShape | None, rules: Iterable[Rule]) -> None:
        self.recipe, self.shape = recipe, shape
        self._layout = layout_of(recipe, shape)
        self._rules = [_seen(rule, recipe, shape, self._layout) for rule in rules]
        self._by_change: dict[frozenset[str], list[_Seen]] = {}

    def faults(self, variant: Recipe, layout: Layout | None) -> Iterator[Fault]:
        """As all rules find them in a variant, for the same shape. Args: layout: the variant's."""
        changed = {name for name in _PARTS if getattr(variant, name) is not getattr(self.recipe, name)}
        if layout != self._layout:
            changed.add(_LAYOUT)
        if (layout is None) != (self._layout is None):  # a rule that asks for this reads nothing of it
            changed.add(_ANY)
        for one in self._of_interest(frozenset(changed)):
            yield from one.faults if changed.isdisjoint(one.reads) else one.rule(variant, self.shape, layout)

    def _of_interest(self, changed: frozenset[str]) -> list[_Seen]:
        """Without the rules that had, and still have, nothing to say."""
        if changed not in self._by_change:
            found = [one for one in self._rules if one.faults or not changed.isdisjoint(one.reads)]
            self._by_change[changed] = found
        return self._by_change[changed]


def _seen(rule: Rule, recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> _Seen:
    reads = {_ANY}
    watched = _watched(recipe, _Recipe, reads.add)
    sizes = None if layout is None else _watched(layout, _Layout, lambda _: reads.add(_LAYOUT))
    faults = tuple(rule(watched, shape, sizes))
    return _Seen(rule, frozenset(reads), faults)


def _watched(instance: Any, kind: type, note: Callable[[str], None]) -> Any:
    """A copy that notes which of its fields are read."""
    copy = object.__new__(kind)
    for field in fields(instance):
        object.__setattr__(copy, field.name, getattr(instance, field.name))
    object.__setattr__(copy, "_note", note)
    return copy


class _Watched:
    """Notes the names of fields that are read."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in object.__getattribute__(self, "__dataclass_fields__"):
            object.__getattribute__(self, "_note")(name)
        return value


class _Recipe(_Watched, Recipe):
    __slots__ = ("_note",)


class _Layout(_Watched, Layout):
    __slots__ = ("_note",)
