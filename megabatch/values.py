"""Frozen dataclasses whose classes are cheap to make.

`dataclasses.dataclass` writes and compiles six functions for a frozen class with slots, before Python 3.13 one by one.
A launch makes some hundred such classes, which took a quarter of its time. Here only `__init__` is compiled; the other
methods are the same code for all. What is made is a dataclass: `fields`, `replace` and `asdict` work, and classes of
either kind compare, print, copy and pickle alike.
"""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # type checkers and editors know the standard library's
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool, slots: bool, kw_only: bool = False):
        """`dataclasses.dataclass(frozen=True, slots=True, kw_only=…)`; no other kind is made here.

        A class of `dataclasses.dataclass(frozen=True)` cannot inherit from one that is made here.
        """
        if not (frozen and slots):
            raise TypeError("only frozen dataclasses with slots are made here; use dataclasses.dataclass")

        def make(cls: type) -> type:
            made = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True, kw_only=kw_only)(cls)
            made.__init__ = _initialiser(made)
            fields = dataclasses.fields(made)
            made._compared = _values([field.name for field in fields if field.compare])
            made._shown = tuple(field.name for field in fields if field.repr)
            for name in _SHARED:
                if name not in vars(cls):
                    setattr(made, name, vars(_Shared)[name])
            return made

        return make


def _initialiser(cls: type) -> Any:
    """The `__init__` of a dataclass whose instances refuse assignments."""
    names: dict[str, Any] = {"_set": object.__setattr__, "_made_anew": _MADE_ANEW}
    positional: list[str] = []
    keyword: list[str] = []
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        value = field.name
        if field.default_factory is not dataclasses.MISSING:
            default, names[f"_make_{field.name}"] = "_made_anew", field.default_factory
            value = f"_make_{field.name}()"
            if field.init:
                value += f" if {field.name} is _made_anew else {field.name}"
        elif field.default is not dataclasses.MISSING:
            default = f"_default_{field.name}"
            names[default] = field.default
        else:
            default = ""
        if field.init:
            (keyword if field.kw_only else positional).append(f"{field.name}={default}" if default else field.name)
        elif not default:
            continue
        elif value == field.name:
            value = default
        lines.append(f" _set(self, {field.name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        lines.append(" self.__post_init__()")
    arguments = ", ".join(["self", *positional, *(["*", *keyword] if keyword else [])])
    exec(f"def __init__({arguments}):\n" + ("\n".join(lines) or " pass"), names)
    function = names["__init__"]
    function.__qualname__ = f"{cls.__qualname__}.__init__"
    function.__module__ = cls.__module__
    arguments_types = {field.name: field.type for field in dataclasses.fields(cls) if field.init}
    function.__annotations__ = {**arguments_types, "return": None}
    return function


def _values(names: list[str]) -> Any:
    """A class attribute: called with an instance it gives what two of them are compared by."""
    return attrgetter(*names) if names else staticmethod(lambda instance: ())


class _MadeAnew:
    """Stands for a field's default that its factory makes for each instance."""

    def __repr__(self) -> str:
        return "<factory>"


_MADE_ANEW = _MadeAnew()


class _Shared:
    """Where the methods that all classes share are written; nothing inherits from it."""

    def __eq__(self: Any, other: Any) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return bool(self._compared(self) == self._compared(other))

    def __hash__(self: Any) -> int:
        return hash(self._compared(self))

    @recursive_repr()
    def __repr__(self: Any) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)
        return f"{self.__class__.__qualname__}({shown})"

    def __setattr__(self: Any, name: str, value: object) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self: Any, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def __getstate__(self: Any) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def __setstate__(self: Any, state: list[Any]) -> None:
        for field, value in zip(dataclasses.fields(self), state, strict=True):
            object.__setattr__(self, field.name, value)


_SHARED = tuple(name for name, method in vars(_Shared).items() if callable(method))
