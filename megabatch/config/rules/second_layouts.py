"""Models beside the trained one with a layout of their own: what must divide, and what cannot be split otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from megabatch.config.layout import counted_layers
from megabatch.config.parallel import Parallel
from megabatch.config.recipe import Recipe
from megabatch.config.reference import is_second_model
from megabatch.config.rules import parallelism
from megabatch.config.rules.preference import without_reference
from megabatch.config.second_layouts import REFERENCE, TEACHER, Role, parallel_of
from megabatch.errors import Fault
from megabatch.plan.batch import nearest_divisors
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


def a_layout_has_a_model(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Sizes of a second model need one."""
    for role, why in ((TEACHER, _without_teacher(recipe)), (REFERENCE, _without_second(recipe))):
        for size, value in role.given(recipe).items():
            if why is not None:
                yield Fault(role.field(size), value, f"has no effect: {why}", try_=(None,))


def _without_teacher(recipe: Recipe) -> str | None:
    if recipe.gkd.teacher_model_server is not None:
        return "the teacher is behind teacher_model_server"
    return "the recipe has no teacher_model" if recipe.gkd.teacher_model is None else None


def _without_second(recipe: Recipe) -> str | None:
    if (why := without_reference(recipe)) is not None:
        return f"{why} has no reference"
    if recipe.rlhf.ref_model_server is not None:
        return "the reference is behind ref_model_server"
    return None if is_second_model(recipe) else "the reference is the policy, with another adapter or none"


def a_reference_that_follows_lies_alike(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    for size, value in REFERENCE.given(recipe).items():
        if recipe.rlhf.sync_ref_model:
            rule = "needs the policy's layout with sync_ref_model=True, which blends the policy's weights into it"
            yield Fault(REFERENCE.field(size), value, rule, try_=(None,))


def ranks_divide(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """What follows from the sizes alone, and for a reference from the policy's shape, which is its own."""
    yield from _ranks_divide(recipe, TEACHER)
    yield from _ranks_divide(recipe, REFERENCE)
    if shape is not None and REFERENCE.given(recipe):
        yield from model_divides(recipe, REFERENCE, shape)


def _ranks_divide(recipe: Recipe, role: Role) -> Iterator[Fault]:
    given = role.given(recipe)
    if not given:
        return
    parallel, world = parallel_of(recipe, role), recipe.resources.world_size
    sizes = [
        getattr(parallel, f"{name}_size")
        for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    ]
    tp, pp, cp = sizes
    if world % (tp * pp * cp):
        size, value = next(iter(given.items()))
        others = tp * pp * cp // getattr(parallel, size) if size in _OF_ALL else tp * pp * cp
        rule = f"must divide the {world} ranks: tp*pp*cp={tp}*{pp}*{cp} of this model does not"
        fits = nearest_divisors(value, of=max(1, world // others)) if world % others == 0 else ()
        yield Fault(role.field(size), value, rule, try_=fits)


_OF_ALL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def model_divides(recipe: Recipe, role: Role, shape: ModelShape, *, chunks: int = 1) -> Iterator[Fault]:
    """What follows from the model's own shape. A size that the recipe does not give it is the run's, and named so.

    Args: chunks: of each pipeline stage of the trained model, which this one has too without a layout of its own.
    """
    parallel = parallel_of(recipe, role, has_experts=shape.num_experts is not None)
    given, own = role.given(recipe), replace(recipe, parallel=parallel)
    for rule in (parallelism.tensor_parallel_divides, parallelism.experts_divide, parallelism.expert_ranks_divide):
        for fault in rule(own, shape, None):
            yield _named(fault, role, given)
    pp = parallel.pipeline_model_parallel_size
    if given and shape.num_layers % pp:
        even = f"must divide the model's num_layers={shape.num_layers}, which are spread evenly over its stages"
        fault = Fault(
            "parallel.pipeline_model_parallel_size", pp, even, try_=nearest_divisors(pp, of=shape.num_layers)
        )
        yield _named(fault, role, given)
    if not given:
        yield from _chunks_divide(parallel, role, shape, chunks=chunks)
    if given and shape.num_experts:
        yield from _rows_dealt_anew_are_dispatched(recipe, role)


def _chunks_divide(parallel: Parallel, role: Role, shape: ModelShape, *, chunks: int) -> Iterator[Fault]:
    """Layers of a model that is split over the stages and chunks of the trained one. Args: parallel: its own."""
    pp, layers = parallel.pipeline_model_parallel_size, counted_layers(parallel, shape.num_layers)
    if layers % (pp * chunks) == 0:
        return
    what = f"num_layers={shape.num_layers}"
    if layers != shape.num_layers:
        what += f", with what account_for_..._in_pipeline_split counts {layers},"
    parts = f"{pp} stages of {chunks} chunks" if chunks > 1 else f"{pp} stages"
    rule = f"must divide over {parts}: the model's {what} do not"
    yield _named(Fault("parallel.pipeline_model_parallel_size", pp, rule), role, {})


def lacks_tokens(name: str, shape: ModelShape, *, rows: int, are_new: bool) -> Fault | None:
    """A teacher reads what the student reads and writes.

    Args: shape: the teacher's; rows: that the student's tokenizer needs, of those that the student has; are_new:
    whether the recipe adds tokens to it.
    """
    if rows <= shape.vocab_size:
        return None
    rule = f"has {shape.vocab_size:,} tokens, and the student's tokenizer "
    if are_new:
        rule += (
            f"with model.new_special_tokens {rows:,}: a teacher without the new tokens cannot read them; name one "
            "that was trained with them, or leave them out"
        )
    else:
        rule += (
            f"{rows:,}: a teacher without all of them cannot read what the student writes; name one that has them, or "
            f"give it rows for them with transformers' resize_token_embeddings({rows})"
        )
    return Fault("gkd.teacher_model", name, rule)


def _rows_dealt_anew_are_dispatched(recipe: Recipe, role: Role) -> Iterator[Fault]:
    """To the experts of a model with a layout of its own."""
    moe, (size, value) = recipe.moe, next(iter(role.given(recipe).items()))
    rule = "needs moe_token_dispatcher_type='alltoall' "
    if moe.moe_token_dispatcher_type == "flex":
        rule += "for a model with experts: DeepEP's dispatch is proven for the trained model's layout alone"
        yield Fault(role.field(size), value, rule, try_=(None,))
    elif moe.moe_token_dispatcher_type == "allgather" or moe.moe_pad_expert_input_to_capacity:
        rule += (
            "without moe_pad_expert_input_to_capacity for a model with experts: rows that are dealt anew do not have "
        )
        rule += "equal lengths"
        yield Fault(role.field(size), value, rule, try_=(None,))


def _named(fault: Fault, role: Role, given: Mapping[str, int]) -> Fault:
    """A fault of a layout as one of a second model's."""
    size = fault.field.partition(".")[2]
    if size in given:
        return replace(fault, field=role.field(size))
    whose = "the teacher's" if role is TEACHER else "the reference's"
    return replace(fault, rule=f"is {whose} too, and {fault.rule}; or give {role.prefix}{size}", try_=())


RULES = (a_layout_has_a_model, a_reference_that_follows_lies_alike, ranks_divide)
