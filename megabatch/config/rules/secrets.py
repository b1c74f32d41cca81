"""No secret may be among a recipe's values: run.json, job scripts and logs are readable by others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megabatch.config.recipe import Recipe
from megabatch.config.rules.fields import own_parameters
from megabatch.errors import Fault
from megabatch.secret_text import SECRET_NAME, secret_in


def no_secrets(recipe: Recipe, *, variant_of: Recipe | None = None) -> Iterator[Fault]:
    """Args: variant_of: a recipe without faults, whose groups are not looked at again where this one shares them."""
    for parameter in own_parameters(recipe, variant_of):
        for kind in _secrets(getattr(getattr(recipe, parameter.group), parameter.name)):
            rule = f"holds {kind}, and run.json is readable by others; export it in the shell that submits instead"
            yield Fault(parameter.dotted, None, rule, bare=True)


def _secrets(value: Any, name: str = "") -> Iterator[str]:
    """Kinds of secrets in a value and in whatever it holds."""
    if isinstance(value, str):
        kind = f"`{name}`" if value and SECRET_NAME.search(name) else secret_in(value)
        if kind is not None:
            yield kind
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, str(key))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _secrets(item, name)
