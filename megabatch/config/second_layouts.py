"""Models beside the trained one that are split otherwise over the same ranks: a teacher, a reference."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from megabatch.config.parallel import Parallel
from megabatch.config.recipe import Recipe
from megabatch.plan import layout as plan
from megabatch.values import dataclass

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass(frozen=True, slots=True)
class Role:
    """A model beside the trained one, as recipes name its sizes."""

    group: str
    prefix: str

    def field(self, size: str) -> str:
        return f"{self.group}.{self.prefix}{size}"

    def given(self, recipe: Recipe) -> dict[str, int]:
        """The sizes that a recipe gives it; none where it is split as the trained model."""
        found = {size: getattr(getattr(recipe, self.group), self.prefix + size) for size in SIZES}
        return {size: value for size, value in found.items() if value is not None}


TEACHER, REFERENCE = Role("gkd", "teacher_"), Role("rlhf", "ref_")


def parallel_of(recipe: Recipe, role: Role, *, has_experts: bool = True) -> Parallel:
    """How a model beside the trained one is split: sizes that the recipe does not give it are the run's. Its layers
    are spread evenly over the stages, which are not interleaved where it has a layout of its own.

    Args: has_experts: whether it has; sizes of experts are 1 where it has none.
    """
    given, parallel = role.given(recipe), recipe.parallel
    even = replace(
        parallel,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        pipeline_model_parallel_layout=None,
    )
    if not has_experts:
        even = replace(even, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    if not given:
        return even
    own = replace(even, **given)  # type: ignore[arg-type]
    return replace(
        own,
        sequence_parallel=own.tensor_model_parallel_size > 1,
        cp_comm_type=own.cp_comm_type if own.context_parallel_size > 1 else None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        num_layers_per_virtual_pipeline_stage=None,
        num_virtual_stages_per_pipeline_rank=None,
        microbatch_group_size_per_virtual_pipeline_stage=own.pipeline_model_parallel_size,
    )


def layout_of(recipe: Recipe, parallel: Parallel) -> plan.Layout | None:
    """The layout of such a model, or None where something does not divide (the rules say what)."""
    world = recipe.resources.world_size
    return plan.layout(
        world_size=world,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        global_batch_size=world,
    )


def row_units(recipe: Recipe) -> tuple[int, int]:
    """What the tokens of a sequence, and those of a row, must be multiples of for every model that computes them:
    2·cp, and 2·cp·tp with sequence parallelism."""
    sequence, row = 1, 1
    split = [role for role in (TEACHER, REFERENCE) if role.given(recipe)]  # the others as the run itself
    for parallel in (recipe.parallel, *(parallel_of(recipe, role) for role in split)):
        cut = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
        sequence = lcm(sequence, cut)
        row = lcm(row, cut * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1))
    return sequence, lcm(sequence, row)
