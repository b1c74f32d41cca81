"""How layers may be split over pipeline stages, evenly, unevenly, interleaved or by a layout string."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.layout import counted_layers, virtual_stages
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError, Fault
from megabatch.plan.batch import nearest_divisors, nearest_multiples
from megabatch.plan.layout import Layout
from megabatch.plan.pipeline_layout import parse
from megabatch.plan.shape import ModelShape

_PP = "parallel.pipeline_model_parallel_size"
_LAYOUT = "parallel.pipeline_model_parallel_layout"
_CHUNKS = "parallel.num_virtual_stages_per_pipeline_rank"
_CHUNK_LAYERS = "parallel.num_layers_per_virtual_pipeline_stage"
_UNEVEN = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_ACCOUNTS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def _set(recipe: Recipe, names: tuple[str, ...]) -> list[str]:
    """Those of these fields that are in use."""
    return [name for name in names if getattr(recipe.parallel, name) not in (None, False)]


def splits_exclude_each_other(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    parallel = recipe.parallel
    uneven, accounts = _set(recipe, _UNEVEN), _set(recipe, _ACCOUNTS)
    if parallel.pipeline_model_parallel_layout is not None:
        for name in (*uneven, *accounts, *_set(recipe, ("num_layers_per_virtual_pipeline_stage",))):
            rule = "cannot be combined with pipeline_model_parallel_layout, which already defines the split"
            yield Fault(f"parallel.{name}", getattr(parallel, name), rule)
        return
    if uneven:
        for name in accounts:
            yield Fault(f"parallel.{name}", True, f"cannot be combined with {uneven[0]}", try_=(False,))
        if parallel.num_layers_per_virtual_pipeline_stage is not None:
            rule = f"cannot be combined with {uneven[0]}; give num_virtual_stages_per_pipeline_rank instead"
            yield Fault(_CHUNK_LAYERS, parallel.num_layers_per_virtual_pipeline_stage, rule)
    if parallel.num_layers_per_virtual_pipeline_stage and parallel.num_virtual_stages_per_pipeline_rank:
        rule = "and num_virtual_stages_per_pipeline_rank set the same thing; give one of them"
        yield Fault(_CHUNK_LAYERS, parallel.num_layers_per_virtual_pipeline_stage, rule)


def splits_need_stages(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    parallel = recipe.parallel
    if parallel.pipeline_model_parallel_size > 1:
        return
    others = (
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "microbatch_group_size_per_virtual_pipeline_stage",
        "pipeline_model_parallel_layout",
    )
    for name in _set(recipe, (*_UNEVEN, *_ACCOUNTS, *others)):
        value = getattr(parallel, name)
        if (name, value) != ("num_virtual_stages_per_pipeline_rank", 1):
            yield Fault(f"parallel.{name}", value, "needs pipeline_model_parallel_size above 1, which is 1")


def layers_divide_evenly(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    parallel = recipe.parallel
    if shape is None or parallel.pipeline_model_parallel_layout is not None or _set(recipe, _UNEVEN):
        return
    pp, layers = parallel.pipeline_model_parallel_size, counted_layers(parallel, shape.num_layers)
    what = f"the model's num_layers={shape.num_layers}"
    if layers != shape.num_layers:
        what += f" with {' and '.join(_set(recipe, _ACCOUNTS))}, together {layers}"
    if layers % pp:
        rule = f"must divide {what} (or give decoder_first_pipeline_num_layers or a layout)"
        yield Fault(_PP, pp, rule, try_=nearest_divisors(pp, of=layers))
        return
    chunk, vp = parallel.num_layers_per_virtual_pipeline_stage, virtual_stages(parallel, shape.num_layers)
    if chunk is not None and layers // pp % chunk:
        rule = f"must divide the {layers // pp} layers of a stage"
        yield Fault(_CHUNK_LAYERS, chunk, rule, try_=nearest_divisors(chunk, of=layers // pp))
    elif layers // pp % vp:
        rule = f"must divide the {layers // pp} layers of a stage"
        yield Fault(_CHUNKS, vp, rule, try_=nearest_divisors(vp, of=layers // pp))


def layers_divide_unevenly(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    parallel = recipe.parallel
    uneven = _set(recipe, _UNEVEN)
    pp = parallel.pipeline_model_parallel_size
    if shape is None or not uneven or pp == 1 or parallel.pipeline_model_parallel_layout is not None:
        return
    field, value = f"parallel.{uneven[0]}", getattr(parallel, uneven[0])
    taken = sum(getattr(parallel, name) for name in uneven)
    rest, stages = shape.num_layers - taken, pp - len(uneven)
    if rest < 0 or (rest == 0) != (stages == 0):
        rule = f"leaves {rest} of the model's {shape.num_layers} layers for the other {stages} stages"
        yield Fault(field, value, rule)
    elif stages and rest % stages:
        fits = [value + rest - other for other in nearest_multiples(rest, of=stages) if value + rest - other > 0]
        yield Fault(field, value, f"leaves {rest} layers, which must divide by the other {stages} stages", try_=fits)
    else:
        yield from _chunks_divide(recipe, rest // stages if stages else None)


def _chunks_divide(recipe: Recipe, middle: int | None) -> Iterator[Fault]:
    vp = recipe.parallel.num_virtual_stages_per_pipeline_rank or 1
    counts = {name: getattr(recipe.parallel, name) for name in _set(recipe, _UNEVEN)}
    if middle is not None:
        counts["layers of each other stage"] = middle
    for name, count in counts.items():
        if count % vp:
            yield Fault(_CHUNKS, vp, f"must divide {name}={count}", try_=nearest_divisors(vp, of=count))


def layout_string_fits(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    parallel = recipe.parallel
    text, pp = parallel.pipeline_model_parallel_layout, parallel.pipeline_model_parallel_size
    if text is None:
        return
    try:
        stages = parse(text)
    except ConfigError as error:
        yield Fault(_LAYOUT, text, str(error))
        return
    if len(stages) % pp:
        yield Fault(_LAYOUT, text, f"has {len(stages)} stages, which must be a multiple of pp={pp}")
    elif parallel.num_virtual_stages_per_pipeline_rank not in (None, len(stages) // pp):
        rule = f"must be {len(stages) // pp}, the layout's {len(stages)} stages over pp={pp}"
        yield Fault(_CHUNKS, parallel.num_virtual_stages_per_pipeline_rank, rule)
    for broken in _broken_layout(stages, shape, recipe.mtp.mtp_num_layers or 0):
        yield Fault(_LAYOUT, text, broken)


def _broken_layout(stages: tuple[str, ...], shape: ModelShape | None, mtp_layers: int) -> Iterator[str]:
    letters = "".join(stages)
    if letters.count("E") != 1 or not stages[0].startswith("E"):
        yield "must begin with the embedding E, its only one"
    if letters.count("L") != 1 or not stages[-1].endswith("L"):
        yield "must end with the loss L, its only one"
    if "t" in letters.partition("m")[2]:
        yield "has transformer layers t after MTP layers m"
    if shape is not None and letters.count("t") != shape.num_layers:
        yield f"has {letters.count('t')} transformer layers t, but the model has num_layers={shape.num_layers}"
    if letters.count("m") != mtp_layers:
        yield f"has {letters.count('m')} MTP layers m, but mtp_num_layers is {mtp_layers}"


RULES = (
    splits_exclude_each_other,
    splits_need_stages,
    layers_divide_evenly,
    layers_divide_unevenly,
    layout_string_fits,
)
