"""Batch formulas: dp = world / (tp * pp * cp), global batches of whole micro-batches, GRPO's rounds."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import lcm

from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.batch import GrpoBatch, grpo_batch, nearest_multiples
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


def _dp(recipe: Recipe) -> Fraction:
    parallel = recipe.parallel
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    return Fraction(recipe.resources.world_size, model_ranks)


def world_holds_whole_replicas(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if _dp(recipe).denominator == 1:
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
    if dp.denominator != 1 or total % (micro * int(dp)) == 0:
        return
    unit = micro * int(dp)
    yield Fault(
        "batch.global_batch_size",
        total,
        f"must be a multiple of micro_batch_size*dp={micro}*{dp}={unit}",
        try_=nearest_multiples(total, of=unit),
    )


def interleaving_has_enough_microbatches(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    if layout is None or layout.vp == 1 or layout.pp == 1:
        return
    field = "parallel.microbatch_group_size_per_virtual_pipeline_stage"
    group = recipe.parallel.microbatch_group_size_per_virtual_pipeline_stage
    count = layout.num_microbatches
    if group is not None and not layout.pp <= group <= count:
        yield Fault(field, group, f"must be from pp={layout.pp} to the number of micro-batches={count}")
    elif 0 < count % (group or layout.pp) < layout.pp or count < layout.pp:
        batches = [n * layout.dp * recipe.batch.micro_batch_size for n in nearest_multiples(count, of=layout.pp)]
        rule = f"gives {count} micro-batches, which must be a multiple of pp={layout.pp} for an interleaved pipeline"
        yield Fault("batch.global_batch_size", recipe.batch.global_batch_size, rule, try_=batches)


def _grpo(recipe: Recipe) -> GrpoBatch | None:
    """GRPO's numbers where they matter and dp is whole."""
    if recipe.kind is None or recipe.kind.name != "grpo" or _dp(recipe).denominator != 1:
        return None
    return grpo_batch(
        global_batch_size=recipe.batch.global_batch_size,
        micro_batch_size=recipe.batch.micro_batch_size,
        dp=int(_dp(recipe)),
        num_generations=recipe.grpo.num_generations,
        steps_per_generation=recipe.grpo.steps_per_generation,
        generation_batch_size=recipe.grpo.generation_batch_size,
    )


def grpo_step_has_whole_prompts(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """global_batch_size / num_generations / dp must be a multiple of micro_batch_size."""
    batch = _grpo(recipe)
    if batch is None or (batch.num_prompts_per_dp_group / batch.micro_batch_size).denominator == 1:
        return
    unit = batch.num_generations * batch.dp * batch.micro_batch_size
    yield Fault(
        "batch.global_batch_size",
        batch.global_batch_size,
        f"gives global_batch_size/num_generations/dp={batch.global_batch_size}/{batch.num_generations}/{batch.dp} = "
        f"{batch.num_prompts_per_dp_group} prompts on each data parallel rank, "
        f"which must be a multiple of micro_batch_size={batch.micro_batch_size}",
        try_=nearest_multiples(batch.global_batch_size, of=unit),
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
        yield Fault("grpo.generation_batch_size", given, rule, try_=nearest_multiples(given, of=total))
    elif steps not in (1, given // total):
        rule = f"must be global_batch_size*steps_per_generation={total}*{steps}={total * steps}"
        yield Fault("grpo.generation_batch_size", given, rule, try_=(total * steps,))


def grpo_round_has_whole_prompts(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """generation_batch_size / num_generations must be a multiple of dp."""
    batch = _grpo(recipe)
    if batch is None or (batch.num_rollout_prompts / batch.dp).denominator == 1:
        return
    given = recipe.grpo.generation_batch_size
    unit = batch.num_generations * batch.dp
    rule = f"must be a multiple of num_generations*dp={batch.num_generations}*{batch.dp}={unit}"
    if given is not None:
        fits = nearest_multiples(given, of=lcm(unit, batch.global_batch_size))
        yield Fault("grpo.generation_batch_size", given, rule, try_=fits)
        return
    size = (
        f"generates {batch.global_batch_size}*{batch.steps_per_generation}={batch.generation_batch_size} completions"
    )
    fits = tuple(n for n in range(1, unit + 1) if n * batch.global_batch_size % unit == 0)
    yield Fault("grpo.steps_per_generation", batch.steps_per_generation, f"{size}, which {rule}", try_=fits[:2])


RULES = (
    world_holds_whole_replicas,
    global_batch_is_whole,
    interleaving_has_enough_microbatches,
    grpo_step_has_whole_prompts,
    grpo_round_has_whole_steps,
    grpo_round_has_whole_prompts,
)
