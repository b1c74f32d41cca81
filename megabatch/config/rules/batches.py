"""Batch formulas: dp = world / (tp * pp * cp), global batches of whole micro-batches, GRPO's rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from math import gcd, lcm

from megabatch.config.layout import virtual_stages
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.batch import GrpoBatch, grpo_batch, nearest_multiples
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_MOST_STEPS = 10_000
"""Of a round, in numbers that errors name: a round of any size is looked through in no time."""


def _dp(recipe: Recipe) -> int | None:
    """Data parallel ranks, or None where the world does not hold whole replicas."""
    parallel = recipe.parallel
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    dp, over = divmod(recipe.resources.world_size, model_ranks)
    return None if over else dp


def world_holds_whole_replicas(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if _dp(recipe) is not None:
        return
    parallel, resources = recipe.parallel, recipe.resources
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    ranks = tp * pp * cp
    fitting = [nodes for nodes in range(1, ranks + 1) if nodes * resources.ranks_per_node % ranks == 0]
    yield Fault(
        "resources.nodes",
        resources.nodes,
        f"gives world size {resources.nodes}*{resources.ranks_per_node}={resources.world_size}, which must be a "
        f"multiple of tp*pp*cp={tp}*{pp}*{cp}={ranks}",
        try_=nearest_multiples(resources.nodes, of=fitting[0]),
    )


def global_batch_is_whole(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    dp, micro, total = _dp(recipe), recipe.batch.micro_batch_size, recipe.batch.global_batch_size
    if dp is None or total % (micro * dp) == 0:
        return
    yield Fault(
        "batch.global_batch_size",
        total,
        f"must be a multiple of micro_batch_size*dp={micro}*{dp}={micro * dp}",
        try_=_global_batches(recipe, shape),
    )


def interleaving_has_enough_microbatches(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    if layout is None or layout.vp == 1 or layout.pp == 1:
        return
    field = "parallel.microbatch_group_size_per_virtual_pipeline_stage"
    group = recipe.parallel.microbatch_group_size_per_virtual_pipeline_stage
    given = layout.num_microbatches
    if group is not None and not layout.pp <= group <= given:
        yield Fault(field, group, f"must be from pp={layout.pp} to the number of micro-batches={given}")
    elif not _interleaves(given, group=group, pp=layout.pp):
        which = f"must be a multiple of pp={layout.pp}"
        if group is not None:
            which = f"must leave none, or at least pp={layout.pp}, over after groups of {group},"
        rule = f"gives {given} micro-batches, which {which} for an interleaved pipeline"
        tried = _global_batches(recipe, shape)
        yield Fault("batch.global_batch_size", recipe.batch.global_batch_size, rule, try_=tried)


def _interleaves(micro_batches: int, *, group: int | None, pp: int) -> bool:
    """Whether megatron-core's interleaved schedule takes so many micro-batches, in groups of `group` or of pp."""
    return micro_batches >= pp and not 0 < micro_batches % (group or pp) < pp


def _global_batches(recipe: Recipe, shape: ModelShape | None) -> tuple[int, ...]:
    """The nearest global batches that keep every rule here, `generation_batch_size` included if any divides it."""
    batch, total = _grpo(recipe), recipe.batch.global_batch_size
    each = recipe.batch.micro_batch_size * (_dp(recipe) or 1)
    unit = each if batch is None else each * batch.num_generations
    group = recipe.parallel.microbatch_group_size_per_virtual_pipeline_stage
    pp = recipe.parallel.pipeline_model_parallel_size
    interleaved = pp > 1 and virtual_stages(recipe.parallel, shape.num_layers if shape else None) > 1

    def fits(size: int) -> bool:
        return not interleaved or _interleaves(size // each, group=group, pp=pp)

    given = None if batch is None else recipe.grpo.generation_batch_size
    if given is not None:
        steps = recipe.grpo.steps_per_generation
        counts = (n for n in range(1, min(given // unit, _MOST_STEPS) + 1) if given % n == 0 and steps in (1, n))
        if whole := [given // n for n in counts if given // n % unit == 0 and fits(given // n)]:
            return _nearest(total, whole)
    return _around(total, unit=unit, fits=fits)


def _around(value: int, *, unit: int, fits: Callable[[int], bool]) -> tuple[int, ...]:
    """The nearest multiple of `unit` at most `value` that fits, and the nearest above, of which there must be one."""
    below = (n for n in range(value // unit * unit, 0, -unit) if fits(n))
    above = (n for n in count((value // unit + 1) * unit, unit) if fits(n))
    return _nearest(value, [n for n in (next(below, None), next(above)) if n is not None])


def _nearest(value: int, numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(numbers, key=lambda number: abs(number - value))[:2])


def _grpo(recipe: Recipe) -> GrpoBatch | None:
    """GRPO's numbers where they matter and dp is whole."""
    dp = _dp(recipe)
    if recipe.kind is None or recipe.kind.name != "grpo" or dp is None:
        return None
    return grpo_batch(
        global_batch_size=recipe.batch.global_batch_size,
        micro_batch_size=recipe.batch.micro_batch_size,
        dp=dp,
        num_generations=recipe.grpo.num_generations,
        steps_per_generation=recipe.grpo.steps_per_generation,
        generation_batch_size=recipe.grpo.generation_batch_size,
    )


def grpo_step_has_whole_prompts(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """global_batch_size / num_generations / dp must be a multiple of micro_batch_size."""
    batch = _grpo(recipe)
    if batch is None or (batch.num_prompts_per_dp_group / batch.micro_batch_size).denominator == 1:
        return
    yield Fault(
        "batch.global_batch_size",
        batch.global_batch_size,
        f"gives global_batch_size/num_generations/dp={batch.global_batch_size}/{batch.num_generations}/{batch.dp} = "
        f"{batch.num_prompts_per_dp_group} prompts on each data parallel rank, "
        f"which must be a multiple of micro_batch_size={batch.micro_batch_size}",
        try_=_global_batches(recipe, shape),
    )


def grpo_round_has_whole_steps(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """generation_batch_size must be a multiple of global_batch_size, and agree with steps_per_generation."""
    batch = _grpo(recipe)
    given = recipe.grpo.generation_batch_size
    if batch is None or given is None:
        return
    steps, total = batch.steps_per_generation, batch.global_batch_size
    if given % total:
        rule = f"must be a multiple of global_batch_size={total}"
        yield Fault("grpo.generation_batch_size", given, rule, try_=_rounds(batch, given))
    elif steps not in (1, given // total):
        rule = f"must be global_batch_size*steps_per_generation={total}*{steps}={total * steps}"
        yield Fault("grpo.generation_batch_size", given, rule, try_=_rounds(batch, given))


def _rounds(batch: GrpoBatch, given: int) -> tuple[int, ...]:
    """The nearest sizes of a round of such steps; none where no round of them has whole prompts."""
    unit, size = batch.num_generations * batch.dp, batch.global_batch_size * batch.steps_per_generation
    if batch.steps_per_generation > 1:
        return () if size % unit else (size,)
    return nearest_multiples(given, of=lcm(unit, batch.global_batch_size))


def grpo_round_has_whole_prompts(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """generation_batch_size / num_generations must be a multiple of dp."""
    batch = _grpo(recipe)
    if batch is None or (batch.num_rollout_prompts / batch.dp).denominator == 1:
        return
    given = recipe.grpo.generation_batch_size
    unit = batch.num_generations * batch.dp
    rule = f"must be a multiple of num_generations*dp={batch.num_generations}*{batch.dp}={unit}"
    if given is not None:
        yield Fault("grpo.generation_batch_size", given, rule, try_=_rounds(batch, given))
        return
    size = (
        f"generates {batch.global_batch_size}*{batch.steps_per_generation}={batch.generation_batch_size} completions"
    )
    whole = unit // gcd(unit, batch.global_batch_size)
    fits = nearest_multiples(batch.steps_per_generation, of=whole)
    yield Fault("grpo.steps_per_generation", batch.steps_per_generation, f"{size}, which {rule}", try_=fits)


RULES = (
    world_holds_whole_replicas,
    global_batch_is_whole,
    interleaving_has_enough_microbatches,
    grpo_step_has_whole_prompts,
    grpo_round_has_whole_steps,
    grpo_round_has_whole_prompts,
)
