"""How PEFT loads adapters of single experts, which transformers 5 stores fused per layer.

From 0.21 on PEFT joins the adapters of single experts when it loads them (its
`utils/transformers_weight_conversion.py`): A of gate and up one below the other, B block by block. It turns the names
of experts' layers in `target_modules` into `target_parameters`, and gives the joined layer `r` and `lora_alpha` times
the number of its parts, whatever `rank_pattern` and `alpha_pattern` say of the parts. That is another model

- with rank-stabilised scales, where alpha would have to grow by the square root alone,
- with patterns for an expert's layers, which are not those of the joined layer,
- with adapters of other layers of the same name (`mlp.gate_proj` of a dense layer or of shared experts), which are
  lost with it, unless they are named in `target_parameters` themselves.

PEFT uses a pattern that names the joined layer before its own pattern does; earlier versions have no such layer and
ignore it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from typing import Any, NamedTuple

from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.config import AdapterConfig
from megabatch.values import dataclass


class Adapted(NamedTuple):
    """A module with an adapter, or a parameter."""

    key: str
    rank: int
    scale: float
    parameter: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """The adapters of all experts in one layer, as PEFT joins them."""

    stack: str
    """The tensor that holds all experts."""
    ranks: tuple[int, ...]
    """Of its parts."""
    scales: frozenset[float] = field(default_factory=frozenset)
    alike: bool = True
    """Whether all experts have parts of the same ranks."""

    def as_loaded(self, config: AdapterConfig) -> AdapterConfig:
        """The config as PEFT changes it for this layer."""
        if len(self.ranks) == 1:
            return config
        own = rf".*\.{re.escape(self.stack.rpartition('.')[2])}"
        values = dict(config.values)
        for pattern, number in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns: dict[str, Any] = values.get(pattern) or {}
            values[pattern] = {**patterns, own: values.get(number, 8) * len(self.ranks)}
        return replace(config, values=values)


def expert_leaves(tables: Tables) -> set[str]:
    """Last parts of the names of experts' layers."""
    return {
        piece.hf.removesuffix(".weight").rpartition(".")[2]
        for mapped in tables.tables["per_expert"]
        if mapped.expert is not None
        for piece in mapped.pieces
    }


def joined_experts(adapted: Sequence[Adapted], tables: Tables) -> list[Joined]:
    """The layers whose experts all have adapters of their own."""
    by_key = {one.key: one for one in adapted}
    stacks: dict[str, list[list[Adapted | None]]] = {}
    for target, mapped in tables.by_target["fused"].items():
        if mapped.expert is not None:
            modules = dict.fromkeys(
                p.hf.removesuffix(".weight") for p in tables.by_target["per_expert"][target].pieces
            )
            parts = [by_key.get(module) for module in modules]
            stacks.setdefault(next(mapped.pieces).hf, []).append(parts)
    return [joined for stack, experts in stacks.items() for joined in _joined(stack, experts)]


def _joined(stack: str, experts: list[list[Adapted | None]]) -> Iterator[Joined]:
    found = [[part for part in expert if part is not None] for expert in experts]
    if found and all(len(parts) == len(expert) for parts, expert in zip(found, experts, strict=True)):
        ranks = [tuple(part.rank for part in parts) for parts in found]
        scales = frozenset(part.scale for parts in found for part in parts)
        yield Joined(stack, ranks[0], scales, len(set(ranks)) == 1)


def differently_loaded(config: AdapterConfig, adapted: Sequence[Adapted], tables: Tables) -> Iterator[str]:
    """The layers that PEFT would compute differently from how the adapter was trained."""
    for joined in joined_experts(adapted, tables):
        seen = joined.as_loaded(config)
        rank = seen.rank(joined.stack)
        if not joined.alike or len(joined.scales) > 1:
            yield f"{joined.stack}: its experts and their parts have ranks and scales that one layer cannot have"
        elif rank != sum(joined.ranks):
            yield f"{joined.stack}: would get rank {rank}, not {sum(joined.ranks)}"
        elif abs(seen.scale(joined.stack, rank) / min(joined.scales) - 1) > 1e-9:
            yield f"{joined.stack}: would be scaled by {seen.scale(joined.stack, rank):g}, not {min(joined.scales):g}"
    leaves = expert_leaves(tables)
    for one in adapted:
        if not one.parameter and ".experts." not in one.key and one.key.rpartition(".")[2] in leaves:
            yield f"{one.key}: would be left aside, because experts' layers have the same name"
