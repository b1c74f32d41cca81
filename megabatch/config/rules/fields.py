"""Checks of single fields, derived from their declarations: type, choice, range, and whether it is built yet."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from megabatch.config.declare import Parameter, parameters
from megabatch.config.field_types import choices, fits, spelled
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.loss_scales import parse
from megabatch.tasks import TASKS

_LARGEST = 2**63 - 1
"""Whole numbers are kept in 64 bits, by torch as by Slurm."""
_LONGEST_NAME = 200
"""A run's folder has its name; file systems take 255 bytes, and sweeps add to it."""
_DATASETS = ("data.dataset", "data.val_dataset")
_NO_NAME = re.compile(r"^(hf::|ms::)|#\d+$")
"""What a dataset's text may say besides where the data is: `#100` alone names none."""
_MAY_BE_BLANK = (
    "data.system",
    "prm.step_separator",
    "rewards.reward_step_separator",
    "reranker.generative_reranker_instruction",
)
"""Texts that samples are made of or cut at, where white space has a meaning."""
_SECRET = "bridge.hub_token"
"""Its value is never shown: someone may have put the token itself there."""


def invalid_fields(recipe: Recipe, *, among: Iterable[Parameter] | None = None) -> Iterator[Fault]:
    """Values of the wrong type, choice or range; rules between fields are not asked about these fields.

    Args: among: the parameters to look at; None means all.
    """
    yield from _name_and_task(recipe)
    for parameter in parameters(Recipe) if among is None else among:
        yield from invalid_value(parameter, getattr(getattr(recipe, parameter.group), parameter.name))


def invalid_value(parameter: Parameter, value: Any) -> Iterator[Fault]:
    """What is wrong with a parameter's value, whatever the others are: at most one fault."""
    if not fits(value, parameter.hint):
        yield mistyped(parameter, value)
    elif isinstance(value, int) and abs(value) > _LARGEST:
        yield Fault(parameter.dotted, value, "must be below 2^63")
    elif not _in_range(parameter, value):
        yield Fault(parameter.dotted, value, f"must be {parameter.facts.limits()}")
    elif parameter.dotted not in _MAY_BE_BLANK and _is_blank(parameter, value):
        yield _blank(parameter, value)
    elif parameter.dotted in _FORMS:
        yield from _FORMS[parameter.dotted](value)


def unbuilt_fields(recipe: Recipe, *, among: Iterable[Parameter] | None = None) -> Iterator[Fault]:
    """Values whose effect is not built yet: refused by name, never ignored. Args: as above."""
    tasks = tuple(dict.fromkeys(task.task for task in TASKS if task.built))
    if recipe.task not in tasks:
        yield Fault("task", recipe.task, "is not built yet", try_=tasks)
    for parameter in parameters(Recipe) if among is None else among:
        value = getattr(getattr(recipe, parameter.group), parameter.name)
        if parameter.unbuilt(value):
            built = parameter.facts.built
            works = built if isinstance(built, tuple) else (parameter.default,)
            shown = [f"{item!r}" if isinstance(item, str) else f"{item}" for item in works]
            why = parameter.facts.refused or "is not built yet"
            yield Fault(parameter.dotted, value, f"{why}; works: {', '.join(shown)}")


def differing_parameters(recipe: Recipe, other: Recipe) -> Iterator[Parameter]:
    """The parameters whose values a recipe does not share with another one: not the same objects, since True == 1."""
    for name, found in _by_group().items():
        if (own := getattr(recipe, name)) is not (its := getattr(other, name)):
            yield from (one for one in found if getattr(own, one.name) is not getattr(its, one.name))


@functools.cache
def _by_group() -> dict[str, tuple[Parameter, ...]]:
    return {name: tuple(found) for name, found in groupby(parameters(Recipe), key=lambda parameter: parameter.group)}


def _name_and_task(recipe: Recipe) -> Iterator[Fault]:
    if not isinstance(recipe.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", recipe.name, re.ASCII):
        yield Fault("name", recipe.name, "must be letters, digits, '.', '-' and '_', and begin with a letter or digit")
    elif len(recipe.name) > _LONGEST_NAME:
        yield Fault("name", None, f"has {len(recipe.name)} characters, above {_LONGEST_NAME}", bare=True)
    names = tuple(dict.fromkeys(task.task for task in TASKS))
    if recipe.task not in names:
        yield Fault("task", recipe.task, f"must be one of {', '.join(map(repr, names))}")


def mistyped(parameter: Parameter, value: Any) -> Fault:
    """The fault of a value that has another type than its parameter."""
    known = [str(choice) for choice in choices(parameter.hint)]
    near = get_close_matches(value, known, n=1) if isinstance(value, str) else []
    rule = f"must be {spelled(parameter.hint)}"
    if _is_not_finite(value):
        rule += ", and finite"
    elif not choices(parameter.hint):
        rule += f", not {_kind_of(value)}"
    return Fault(parameter.dotted, value, rule, try_=near or _plain(value), bare=parameter.dotted == _SECRET)


def _kind_of(value: Any) -> str:
    """The type of a value; of a list, the types in it, since the list itself may be right."""
    if isinstance(value, tuple) and value:
        return f"a list with {' and '.join(sorted({_kind_of(item) for item in value}))}"
    kind = type(value)
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def _plain(value: Any) -> tuple[str, ...]:
    """How to write a path, or a number of numpy's or torch's, as what Python has itself."""
    if isinstance(value, os.PathLike):
        return ("str(path)",)
    if isinstance(value, tuple) and any(isinstance(item, os.PathLike) for item in value):
        return ("[str(path) for path in paths]",)
    return ("its .item()",) if callable(getattr(value, "item", None)) else ()


def _is_not_finite(value: Any) -> bool:
    """Whether a number, or one of a list's, is infinite or none, or more than a float holds: it is of the type, and
    refused all the same."""
    numbers = value if isinstance(value, tuple) else (value,)
    return any(isinstance(one, int | float) and not abs(one) <= sys.float_info.max for one in numbers)


def _in_range(parameter: Parameter, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not number or parameter.facts.allows(value)


def _is_blank(parameter: Parameter, value: Any) -> bool:
    """Whether a text, or one of a list's, says nothing. A shell leaves that of a variable that is not set, and as a
    path it would mean the current folder."""
    datasets = parameter.dotted in _DATASETS
    texts = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, str)]
    return any(not (_NO_NAME.sub("", text) if datasets else text).strip() for text in texts)


def _blank(parameter: Parameter, value: Any) -> Fault:
    if not isinstance(value, tuple):
        return Fault(parameter.dotted, value, "is blank; give a value, or leave it out")
    return Fault(parameter.dotted, list(value), "has a blank item; leave it out")


def _shard_size(value: Any) -> Iterator[Fault]:
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?)?B", value):
        yield Fault("checkpoint.max_shard_size", value, "must be a number with B, KB, MB, GB or GiB", try_=("5GB",))


def _token_name(value: Any) -> Iterator[Fault]:
    if isinstance(value, str) and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", value):
        rule = "must be the name of an environment variable that holds the token, never the token itself"
        yield Fault(_SECRET, None, rule, try_=("HF_TOKEN",), bare=True)


def _loss_scale(value: Any) -> Iterator[Fault]:
    try:
        parse(value or "default")
    except ValueError as e:
        yield Fault("data.loss_scale", value, str(e))


_FORMS: dict[str, Callable[[Any], Iterator[Fault]]] = {
    "checkpoint.max_shard_size": _shard_size,
    "data.loss_scale": _loss_scale,
    _SECRET: _token_name,
}
"""Texts that must look like something."""
