"""adapter_config.json for adapters as they are written: the source's own, but for what would be wrong in it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.config import AdapterConfig, dump


class Adapted(NamedTuple):
    """A module with an adapter, or a parameter."""

    key: str
    rank: int
    scale: float
    parameter: bool


_LAYER = re.compile(r".*?\.layers\.\d+\.")


def described(config: AdapterConfig, adapted: Sequence[Adapted], tables: Tables) -> bytes:
    """The text of adapter_config.json; the source's, byte for byte, where that says it all."""
    values = dict(config.values)
    if not all(_targeted(config, one) for one in adapted):
        parameters = [one.key for one in adapted if one.parameter]
        modules = [one.key for one in adapted if not one.parameter]
        values["target_modules"] = _names(modules, _others(tables, modules))
        values["target_parameters"] = sorted({_LAYER.sub("", key) for key in parameters}) or None
    changed = replace(config, values=values)
    ranks = {one.key: one.rank for one in adapted if changed.rank(one.key) != one.rank}
    values = values | _patterns(values, "rank_pattern", ranks, adapted)
    changed = replace(config, values=values)
    alphas = {
        one.key: changed.alpha_for(one.scale, one.rank)
        for one in adapted
        if abs(changed.scale(one.key, one.rank) - one.scale) > 1e-12 * one.scale
    }
    values = values | _patterns(values, "alpha_pattern", alphas, adapted)
    return config.path.read_bytes() if values == config.values else dump(values)


def _targeted(config: AdapterConfig, one: Adapted) -> bool:
    if config.values.get("ensure_weight_tying"):
        return True
    return config.targets_parameter(one.key) if one.parameter else config.targets(one.key)


def _others(tables: Tables, modules: Iterable[str]) -> set[str]:
    """Modules of the model that have no adapter."""
    weights = (name.removesuffix(".weight") for name, shape in tables.shapes.items() if len(shape) == 2)
    return set(weights) - set(modules)


def _names(modules: Sequence[str], others: set[str]) -> list[str]:
    """Last parts of names where they mean these modules alone, else whole names."""
    ambiguous = {name.rpartition(".")[2] for name in others}
    leaves = ((name, name.rpartition(".")[2]) for name in modules)
    return sorted({name if leaf in ambiguous else leaf for name, leaf in leaves})


def _patterns(
    values: dict[str, Any], field: str, wanted: dict[str, Any], adapted: Sequence[Adapted]
) -> dict[str, dict[str, Any]]:
    """The field with patterns for what it would give another number: before those that are there, so that they win."""
    if not wanted:
        return {}
    by_pattern: dict[str, set[Any]] = defaultdict(set)
    for one in adapted:
        by_pattern[_pattern(one.key)].add(wanted.get(one.key))
    new = {}
    for key, value in wanted.items():
        alike = len(by_pattern[_pattern(key)]) == 1
        new[_pattern(key) if alike else re.escape(key)] = value
    return {field: {**new, **(values.get(field) or {})}}


def _pattern(key: str) -> str:
    """The key in any layer, and of any expert."""
    inner = re.escape(_LAYER.sub("", key))
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", inner)
