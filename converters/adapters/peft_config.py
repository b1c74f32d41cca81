"""adapter_config.json for adapters as they are written: the source's own, but for what would be wrong in it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.config import NAME, AdapterConfig, dump
from megabatch.converters.adapters.peft_experts import Adapted, differently_loaded, joined_experts
from megabatch.errors import ConversionError

_LAYER = re.compile(r".*?\.layers\.\d+\.")


def described(
    config: AdapterConfig, adapted: Sequence[Adapted], tables: Tables, *, asked: str | None
) -> tuple[bytes, list[str]]:
    """The text of adapter_config.json; the source's, byte for byte, where that says it all. And what is to be said.

    `asked`: the layout of experts that was asked for. PEFT is then kept from computing another model (`peft_experts`),
    or, without patterns that could, the config is refused; the source's own is given back as it is, with a note.
    Raises: ConversionError.
    """
    described_ = _described(config, adapted, tables)
    if asked is not None or described_.values != config.values:
        described_ = _joined_as_trained(described_, adapted, tables)
    lost = list(differently_loaded(described_, adapted, tables))
    if lost and asked is not None:
        raise ConversionError(
            f"{config.path.parent}: peft_format={asked}: PEFT 0.21 would load it as a different model: {_some(lost)}"
        )
    text = config.path.read_bytes() if described_.values == config.values else dump(described_.values)
    if not lost:
        return text, []
    note = (
        f"PEFT 0.21 loads this adapter as a different model from the one that was trained: {_some(lost)}; "
        "--peft_format writes an adapter_config.json that prevents this"
    )
    return text, [note]


def written(values: dict[str, Any], adapted: Sequence[Adapted], tables: Tables, *, for_peft: bool = True) -> bytes:
    """The text of adapter_config.json of an adapter that no file has yet.

    Args: values: all but which layers are adapted; adapted: every layer and parameter with an adapter; for_peft: not
    only for us to read.
    Raises: ConversionError where PEFT would load another model than was trained.
    """
    config = AdapterConfig(Path(NAME), {**values, "target_modules": [], "target_parameters": None})
    config = _joined_as_trained(_described(config, adapted, tables), adapted, tables)
    lost = list(differently_loaded(config, adapted, tables))
    if lost and for_peft:
        raise ConversionError(f"PEFT 0.21 would load this adapter as another model: {_some(lost)}")
    return dump(config.values)


def _some(faults: Sequence[str]) -> str:
    return faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


def _described(config: AdapterConfig, adapted: Sequence[Adapted], tables: Tables) -> AdapterConfig:
    """The config with every adapted module and parameter, and its rank and scale."""
    values = dict(config.values)
    if not all(_targeted(config, one) for one in adapted):
        parameters = [one.key for one in adapted if one.parameter]
        modules = [one.key for one in adapted if not one.parameter]
        values["target_modules"] = _names(modules, _others(tables, modules))
        values["target_parameters"] = sorted({_LAYER.sub("", key) for key in parameters}) or None
    return _with_patterns(replace(config, values=values), adapted)


def _with_patterns(config: AdapterConfig, adapted: Sequence[Adapted]) -> AdapterConfig:
    """With patterns for the ranks and scales that it would get wrong."""
    values = config.values
    ranks = {one.key: one.rank for one in adapted if config.rank(one.key) != one.rank}
    values = values | _patterns(values, "rank_pattern", ranks, adapted)
    changed = replace(config, values=values)
    alphas = {
        one.key: changed.alpha_for(one.scale, one.rank)
        for one in adapted
        if abs(changed.scale(one.key, one.rank) - one.scale) > 1e-12 * one.scale
    }
    return replace(config, values=values | _patterns(values, "alpha_pattern", alphas, adapted))


def _joined_as_trained(config: AdapterConfig, adapted: Sequence[Adapted], tables: Tables) -> AdapterConfig:
    """With patterns for experts' layers that PEFT joins and would give another rank or scale."""
    layers, wrong = [], []
    for joined in joined_experts(adapted, tables):
        seen, rank = joined.as_loaded(config), sum(joined.ranks)
        scale, *others = joined.scales
        layers.append(Adapted(joined.stack, rank, scale, True))
        right = seen.rank(joined.stack) == rank and abs(seen.scale(joined.stack, rank) / scale - 1) < 1e-12
        if joined.alike and not others and not right:
            wrong.append(layers[-1])
    ranks = {one.key: one.rank for one in wrong}
    alphas = {one.key: config.alpha_for(one.scale, one.rank) for one in wrong}
    values = config.values | _patterns(config.values, "rank_pattern", ranks, layers)
    return replace(config, values=values | _patterns(config.values, "alpha_pattern", alphas, layers))


def _targeted(config: AdapterConfig, one: Adapted) -> bool:
    if config.values.get("ensure_weight_tying"):
        return True
    return config.targets_parameter(one.key) if one.parameter else config.targets(one.key)


def _others(tables: Tables, modules: Iterable[str]) -> set[str]:
    """Modules of the model without an adapter."""
    weights = (name.removesuffix(".weight") for name, shape in tables.shapes.items() if len(shape) == 2)
    return set(weights) - set(modules)


def _names(modules: Sequence[str], others: set[str]) -> list[str]:
    """Last parts of names if these match only these modules, else whole names."""
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
