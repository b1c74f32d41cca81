"""Host memory that `optimizer_cpu_offload` takes on a node: a line of the plan, and a fault where it cannot fit."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.recipe import Recipe
from megabatch.entry.estimate import settings_of
from megabatch.errors import Fault
from megabatch.plan.figures import GIB
from megabatch.plan.rank_size import rank_sizes
from megabatch.plan.shape import ModelShape


def offloaded_gib(recipe: Recipe, shape: ModelShape) -> float:
    """GiB on a node whose ranks are all as large as the largest; 0 without offloading."""
    settings = settings_of(recipe, shape)
    most = max(size.host_bytes(settings) for size in rank_sizes(shape, settings))
    return most * recipe.resources.ranks_per_node / GIB


def faults(recipe: Recipe, shape: ModelShape) -> Iterator[Fault]:
    """The optimizer alone, without what else a node holds."""
    has, needs = recipe.resources.mem_gib, offloaded_gib(recipe, shape)
    if has is not None and needs > has:
        rule = f"is less than the {needs:.1f} GiB that optimizer_cpu_offload keeps on a node"
        yield Fault("resources.mem_gib", has, rule + "; raise it, or lower optimizer_offload_fraction")


def lines(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """One line for a plan."""
    if needs := offloaded_gib(recipe, shape):
        yield f"optimizer_cpu_offload: {needs:.1f} GiB of host memory on a node"
