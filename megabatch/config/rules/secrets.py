"""No secret may be among a recipe's values and commands: others can read run.json, job scripts and logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megabatch.config.declare import Parameter, parameters
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.secret_text import is_secret_name, secret_in, secrets_in_words


def no_secrets(recipe: Recipe, *, among: Iterable[Parameter] | None = None) -> Iterator[Fault]:
    """Args: among: the parameters to look at; None means all."""
    for parameter in parameters(Recipe) if among is None else among:
        for kind in secrets_of(getattr(getattr(recipe, parameter.group), parameter.name)):
            rule = f"holds {kind}, but others can read run.json; export it in the submitting shell instead"
            yield Fault(parameter.dotted, None, rule, bare=True)


def no_secrets_in_words(place: str, words: Sequence[str]) -> Iterator[Fault]:
    """Of a command: what it is given, `--name value` and scripts included; one fault for each kind."""
    for kind in dict.fromkeys(secrets_in_words([str(word) for word in words])):
        rule = f"holds {kind}, but others can read run directories, scripts and process lists; export it "
        yield Fault(place, None, rule + "in the submitting shell, and let the program read it there", bare=True)


def secrets_of(value: Any, name: str = "") -> Iterator[str]:
    """Kinds of secrets in a value and in whatever it holds."""
    if isinstance(value, str):
        kind = f"`{name}`" if value and is_secret_name(name) else secret_in(value)
        if kind is not None:
            yield kind
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_of(item, str(key))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from secrets_of(item, name)
