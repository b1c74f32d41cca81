"""Which tensors of a model are frozen, by the names that people give: prefixes, patterns, a share from the input on.

Names are megatron-core's (`decoder.layers.0.`) or Hugging Face's (`model.layers.0.`). A megatron-core tensor is frozen
as a whole, so Hugging Face names must cover all the tensors that it fuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from megabatch.converters.mapping import Mapped, elements
from megabatch.errors import ConversionError
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Freezing:
    """The recipe's settings for freezing; each field is the parameter of that name."""

    freeze_parameters: Sequence[str] = ()
    freeze_parameters_regex: str | None = None
    freeze_parameters_ratio: float = 0.0
    trainable_parameters: Sequence[str] = ()
    trainable_parameters_regex: str | None = None

    @staticmethod
    def of(group: Any) -> Freezing:
        """Of a group of parameters that has these."""
        return Freezing(**{field.name: getattr(group, field.name) for field in fields(Freezing)})


def frozen_names(table: Sequence[Mapped], freezing: Freezing) -> frozenset[str]:
    """Canonical names of the frozen tensors.

    Raises: ConversionError naming the parameter, for a prefix or pattern that matches no tensor's name, for a part of
    a fused tensor, and when nothing is left to train.
    """
    names = _names(table)
    frozen = _share(table, freezing.freeze_parameters_ratio)
    frozen |= _chosen(names, "freeze_parameters", freezing.freeze_parameters, freezing.freeze_parameters_regex)
    frozen -= _chosen(
        names, "trainable_parameters", freezing.trainable_parameters, freezing.trainable_parameters_regex
    )
    if frozen == names.keys():
        raise ConversionError("freeze_parameters: nothing is left to train; name some in trainable_parameters")
    return frozenset(frozen)


def trains_biases_alone(table: Sequence[Mapped], freezing: Freezing) -> bool:
    """Whether a bias is trained whose weight is frozen. Raises: as `frozen_names`."""
    frozen = frozen_names(table, freezing)
    biases = {mapped.name for mapped in table if mapped.name.endswith(".bias")} - frozen
    return any(f"{name.removesuffix('.bias')}.weight" in frozen for name in biases)


def _names(table: Sequence[Mapped]) -> dict[str, list[str]]:
    """Hugging Face's names of all that is in each tensor, and in those of a layer's experts."""
    names: dict[str, list[str]] = {}
    for mapped in table:
        names.setdefault(mapped.name, []).extend(dict.fromkeys(piece.hf for piece in mapped.pieces))
    return names


def _share(table: Sequence[Mapped], ratio: float) -> set[str]:
    """The first tensors, in layer order, that together hold at most this fraction of all elements."""
    sizes: dict[str, int] = {}
    for mapped in table:
        sizes[mapped.name] = sizes.get(mapped.name, 0) + elements(mapped.shape)
    room, taken = ratio * sum(sizes.values()), set[str]()
    for name, size in sizes.items():
        room -= size
        if room < -1e-9:
            break
        taken.add(name)
    return taken


def _chosen(names: dict[str, list[str]], field: str, prefixes: Sequence[str], regex: str | None) -> set[str]:
    found: set[str] = set()
    for prefix in prefixes:
        if not any(name.startswith(prefix) for own, theirs in names.items() for name in (own, *theirs)):
            near = _nearest(prefix, names)
            raise ConversionError(f"{field}: no parameter's name begins with {prefix!r}; {near}")
    if prefixes:
        found |= _meant(names, field, lambda name: name.startswith(tuple(prefixes)))
    if regex is not None:
        pattern = _compiled(f"{field}_regex", regex)
        matching = _meant(names, f"{field}_regex", lambda name: pattern.search(name) is not None)
        if not matching:
            raise ConversionError(f"{field}_regex: {regex!r} is found in no parameter's name; {_nearest('', names)}")
        found |= matching
    return found


def _meant(names: dict[str, list[str]], field: str, fits: Callable[[str], bool]) -> set[str]:
    found = set()
    for name, theirs in names.items():
        fitting = [one for one in theirs if fits(one)]
        if fits(name) or len(fitting) == len(theirs):
            found.add(name)
        elif fitting:
            others = ", ".join(one for one in theirs if one not in fitting)
            raise ConversionError(
                f"{field}: {fitting[0]} is a part of {name}, with {others}; name all of them or none"
            )
    return found


def _compiled(field: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as e:
        raise ConversionError(f"{field}: {regex!r} is no regular expression: {e}") from e


def _nearest(prefix: str, names: dict[str, list[str]]) -> str:
    """A name of each of the two kinds that begins most like the prefix."""

    def alike(name: str) -> int:
        return next((i for i, (a, b) in enumerate(zip(name, prefix, strict=False)) if a != b), len(prefix))

    own = max(names, key=alike)
    theirs = max((name for found in names.values() for name in found), key=alike)
    return f"the nearest are {own} and {theirs}"
