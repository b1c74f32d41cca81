"""Whether a `Sweep` of a recipe file has the types that it says; what its values mean is a matter of `points`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megabatch.errors import ConfigError, Fault
from megabatch.sweep.declare import Sweep

_LONGEST_NAME = 200
"""As of a recipe: a name becomes a folder's, which may have 255 bytes, and a job array's."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def require_declaration(sweep: Sweep) -> None:
    """Raises: ConfigError with every field of the declaration that cannot be read."""
    faults = [
        *_parameters("grid", sweep.grid),
        *_parameters("zip", sweep.zip),
        *_points(sweep.list),
        *_filter(sweep.filter),
        *_most(sweep.max_parallel),
        *_name(sweep.name),
    ]
    if faults:
        raise ConfigError(faults)


def _parameters(part: str, given: Any) -> Iterator[Fault]:
    if not isinstance(given, Mapping):
        rule = "must be a dictionary of parameters and lists of values, such as {'lr': [1e-5, 2e-5]}"
        yield Fault(f"sweep.{part}", given, rule)
        return
    yield from _names(f"sweep.{part}", given)


def _points(given: Any) -> Iterator[Fault]:
    if not isinstance(given, list | tuple):
        yield Fault("sweep.list", given, "must be a list of dictionaries, such as [{'lr': 1e-5, 'seed': 1}]")
        return
    for number, row in enumerate(given):
        place = f"sweep.list[{number}]"
        if isinstance(row, Mapping):
            yield from _names(place, row)
        else:
            yield Fault(place, row, "must be a dictionary of parameters and values")


def _names(place: str, given: Mapping[Any, Any]) -> Iterator[Fault]:
    for name in given:
        if not isinstance(name, str):
            yield Fault(f"{place}[{name!r}]", None, "must be a parameter's name, which is text", bare=True)


def _filter(given: Any) -> Iterator[Fault]:
    if given is not None and not callable(given):
        yield Fault("sweep.filter", given, "must be a function of a point's recipe that returns whether to run it")


def _most(given: Any) -> Iterator[Fault]:
    if given is not None and (type(given) is not int or given < 1):
        yield Fault("sweep.max_parallel", given, "must be a whole number, at least 1, or None")


def _name(given: Any) -> Iterator[Fault]:
    if given is None:
        return
    if not isinstance(given, str):
        yield Fault("sweep.name", given, "must be text or None")
    elif not given.strip() or "/" in given or given in (".", "..") or _CONTROL.search(given):
        rule = "names a folder: it must not be blank, hold / or control characters, or be . or .."
        yield Fault("sweep.name", given, rule)
    elif len(given) > _LONGEST_NAME:
        yield Fault("sweep.name", None, f"has {len(given)} characters, above {_LONGEST_NAME}", bare=True)
