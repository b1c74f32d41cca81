"""Rules for what the backward pass computes again."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.layout import chunks_of
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.batch import nearest_divisors
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_GRANULARITY = "recompute.recompute_granularity"


def recompute_is_consistent(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    recompute = recipe.recompute
    granularity, method, layers = (
        recompute.recompute_granularity,
        recompute.recompute_method,
        recompute.recompute_num_layers,
    )
    if granularity == "full":
        if method is None:
            yield Fault(_GRANULARITY, granularity, "needs recompute_method uniform or block")
        if layers is None:
            yield Fault(_GRANULARITY, granularity, "needs recompute_num_layers", try_=("recompute_num_layers=1",))
    else:
        for name, value in (("recompute_method", method), ("recompute_num_layers", layers)):
            if value is not None:
                rule = f"needs recompute_granularity='full', which is {granularity!r}"
                yield Fault(f"recompute.{name}", value, rule)
    modules = recompute.recompute_modules
    if granularity != "selective" and modules != ("core_attn",):
        rule = f"needs recompute_granularity='selective', which is {granularity!r}"
        yield Fault("recompute.recompute_modules", modules, rule)


def recompute_modules_exist(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.recompute.recompute_granularity != "selective":
        return
    modules, field = recipe.recompute.recompute_modules, "recompute.recompute_modules"
    for module in modules:
        if module.startswith("moe") and shape is not None and shape.num_experts is None:
            yield Fault(field, modules, f"has {module!r}, but {shape.model_type} has no experts")
    if "moe_act" in modules and not recipe.moe.moe_grouped_gemm:
        yield Fault(field, modules, "has 'moe_act', which needs moe_grouped_gemm")
    if "mla_up_proj" in modules and not recipe.mla.multi_latent_attention:
        yield Fault(field, modules, "has 'mla_up_proj', which needs multi_latent_attention")


def recompute_units_divide(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    recompute = recipe.recompute
    unit, field = recompute.recompute_num_layers, "recompute.recompute_num_layers"
    if shape is None or unit is None or recompute.recompute_granularity != "full":
        return
    counts = sorted({len(chunk.layers) for chunk in chunks_of(recipe.parallel, shape.num_layers) or ()})
    for count in counts:
        if recompute.recompute_method == "uniform" and count % unit:
            rule = f"must divide the {count} layers of a pipeline chunk"
            yield Fault(field, unit, rule, try_=nearest_divisors(unit, of=count))
    if recompute.recompute_method == "block" and counts and unit > counts[-1]:
        yield Fault(field, unit, f"must be at most the {counts[-1]} layers of a pipeline chunk")


RULES = (
    recompute_is_consistent,
    recompute_modules_exist,
    recompute_units_divide,
)
