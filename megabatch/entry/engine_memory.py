"""Whether the rollout engines that a recipe has inside its ranks fit on their GPUs, beside the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megabatch.config.recipe import Recipe
from megabatch.entry.estimate import settings_of
from megabatch.errors import Fault
from megabatch.plan.engines import Engine, Moment, moments
from megabatch.plan.estimate import Estimate
from megabatch.plan.figures import GIB
from megabatch.plan.gpus import Gpu
from megabatch.plan.shape import ModelShape


def moments_of(recipe: Recipe, shape: ModelShape, found: Estimate, gpu: Gpu) -> Mapping[str, Moment]:
    """The fullest GPU at each time; none for a recipe without engines of the policy in its ranks."""
    rollout, kind = recipe.rollout, recipe.kind
    writes = kind is not None and (kind.generates or (kind.name == "gkd" and recipe.gkd.lmbda > 0))
    if not writes or rollout.vllm_mode == "server":
        return {}
    engine = _engine(recipe, shape, found, gpu)
    every = [
        moments(
            engine,
            rank,
            offload_model=rollout.offload_model,
            offload_optimizer=rollout.offload_optimizer,
            frozen_copies=settings_of(recipe, shape).frozen_copies,
        )
        for rank in found.stages
    ]
    return {name: max((one[name] for one in every), key=lambda moment: moment.total) for name in every[0]}


def _engine(recipe: Recipe, shape: ModelShape, found: Estimate, gpu: Gpu) -> Engine:
    """Of vLLM as its settings say; of transformers the whole model, whose keys and values are not counted."""
    rollout, size = recipe.rollout, settings_of(recipe, shape).weight_bytes
    if rollout.vllm_mode is None:
        whole = found.parameters * size
        return Engine(weights=whole, share=whole, sleeps=rollout.sleep_level > 0)
    return Engine(
        weights=found.parameters * size // rollout.vllm_tensor_parallel_size,
        share=int(rollout.vllm_gpu_memory_utilization * gpu.memory_gib * GIB),
        sleeps=rollout.sleep_level > 0,
    )


def faults(recipe: Recipe, shape: ModelShape, found: Estimate, gpu: Gpu) -> Iterator[Fault]:
    """What cannot fit even without anything that is only modelled."""
    field, share = "rollout.vllm_gpu_memory_utilization", recipe.rollout.vllm_gpu_memory_utilization
    if recipe.rollout.vllm_mode != "colocate":
        return
    engine = _engine(recipe, shape, found, gpu)
    if engine.weights >= engine.share:
        rule = (
            f"gives the engine {engine.share / GIB:.1f} of {gpu.memory_gib:g} GiB on {gpu.name}, less than its "
            f"weights of {engine.weights / GIB:.1f} GiB; raise it or vllm_tensor_parallel_size"
        )
        yield Fault(field, share, rule)
        return
    for name, moment in moments_of(recipe, shape, found, gpu).items():
        if (certain := moment.engine + moment.certain) > gpu.memory_gib * GIB:
            rule = (
                f"does not fit on {gpu.name} while {_WORDS[name]}: the engine's {moment.engine / GIB:.1f} GiB and the "
                f"trainer's {moment.certain / GIB:.1f} GiB (weights, gradients, optimizer) are {certain / GIB:.1f} of "
                f"{gpu.memory_gib:g} GiB; {_cure(recipe, name)}"
            )
            yield Fault(field, share, rule)


_WORDS = {"training": "the ranks train", "sending": "weights are sent", "generating": "it generates"}


def _cure(recipe: Recipe, name: str) -> str:
    rollout = recipe.rollout
    if not rollout.sleep_level and name != "generating":
        return "set sleep_level=1, or lower it"
    missing = [one for one in ("offload_optimizer", "offload_model") if not getattr(rollout, one)]
    if name == "generating" and missing:
        return f"set {' and '.join(f'{one}=True' for one in missing)}, or lower it"
    return "lower it, or split the model over more GPUs"


def lines(recipe: Recipe, shape: ModelShape, found: Estimate, gpu: Gpu) -> Iterator[str]:
    """One line for a plan."""
    every = moments_of(recipe, shape, found, gpu)
    if not every:
        return
    parts = [
        f"{name} {moment.total / GIB:.1f} (engine {moment.engine / GIB:.1f})"
        + (", more than it has" if moment.total > gpu.memory_gib * GIB else "")
        for name, moment in every.items()
    ]
    yield f"{gpu.name} with the engine inside the ranks, GiB of {gpu.memory_gib:g}: {'; '.join(parts)}"
