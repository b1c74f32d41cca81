"""Rotary embeddings: `rope_scaling` has all numbers that its kind needs, and for a new model nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_FIELD = "model.rope_scaling"
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embeddings that the trainer computes, with the numbers that each needs."""
_KINDS = ("rope_type", "type")
"""Both spellings of the kind; transformers reads the older one too."""


def rope_scaling_is_complete(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Of other kinds `megabatch.trainable` says that they are not built."""
    is_new = recipe.model.model is None
    given = recipe.model.rope_scaling if is_new or shape is None else shape.rope_scaling
    if not given:
        return
    kind = next((given[name] for name in _KINDS if given.get(name)), None if is_new else "default")
    if not isinstance(kind, str) or (is_new and kind not in _NUMBERS):
        rule = f"needs rope_type, one of {', '.join(_NUMBERS)}"
        yield Fault(_FIELD, dict(given), rule)
        return
    for name in _NUMBERS.get(kind, ()):
        if not _is_positive(given.get(name)):
            rule = f"of rope_type {kind} needs a positive number {name}, which is {given.get(name)!r}"
            yield Fault(_FIELD, dict(given), rule)
    unread = sorted(set(given) - {*_KINDS, *_NUMBERS.get(kind, given)}) if is_new else []
    if unread:
        yield Fault(
            _FIELD, dict(given), f"has {', '.join(unread)}, which rope_type {kind} does not read; leave it out"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


RULES = (rope_scaling_is_complete,)
