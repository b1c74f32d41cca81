"""Memory and time of a recipe, and whether a layout of it may run: the plan's arithmetic applied to recipes."""

from __future__ import annotations

from dataclasses import dataclass

from megabatch.config.recipe import Recipe
from megabatch.plan.estimate import Estimate
from megabatch.plan.gpus import Gpu
from megabatch.plan.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a recipe's layout is worth running."""

    keep: bool
    reason: str
    """Why not, in words: the first broken rule, or the memory that it takes; empty where it is kept."""
    estimate: Estimate | None
    """None where the rules say that it cannot run."""


def estimate_of(recipe: Recipe, shape: ModelShape, gpu: Gpu) -> Estimate:
    """What a step of a recipe without faults takes on these GPUs."""
    raise NotImplementedError


def verdict_of(recipe: Recipe, shape: ModelShape, *, gpu_memory_gib: float | None = None, gpu: Gpu) -> Verdict:
    """Checks the rules, the memory (`gpu_memory_gib`, by default the GPU's), and that tp and ep stay inside a node."""
    raise NotImplementedError
