"""Memory and time of a training step, from a model's shape, a run's settings and a GPU."""

from __future__ import annotations

from megabatch.plan.figures import Estimate, MemoryEstimate, StepEstimate
from megabatch.plan.gpus import Gpu
from megabatch.plan.memory import stage_memory
from megabatch.plan.model_size import num_parameters
from megabatch.plan.rank_size import rank_sizes
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.step_time import step_time

__all__ = ["Estimate", "MemoryEstimate", "StepEstimate", "estimate"]


def estimate(shape: ModelShape, settings: Settings, gpu: Gpu) -> Estimate:
    """What a step takes; weights, gradients and optimizer are exact, the rest is modelled (docs/planning.md)."""
    sizes = rank_sizes(shape, settings)
    stages = tuple(stage_memory(shape, settings, sizes))
    return Estimate(
        parameters=num_parameters(shape),
        memory=max(stages, key=lambda stage: stage.total),
        stages=stages,
        step=step_time(shape, settings, sizes, gpu),
    )
