"""Engines inside the ranks: refused where they cannot fit beside the trainer, with the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megabatch import Data, Grpo, Model, Parallel, Recipe, Resources, Rlhf, Rollout
from megabatch.converters.families import family_of
from megabatch.entry.engine_memory import faults, lines
from megabatch.entry.estimate import estimate_of, gpu_of
from megabatch.plan.published_models import KNOWN_MODELS

MODEL = "Qwen/Qwen2.5-7B"
SHAPE = family_of(KNOWN_MODELS[MODEL]).shape(KNOWN_MODELS[MODEL])
GPU = gpu_of("H100")


def found(share: float, *, tp: int = 8, **rollout: Any) -> tuple[list[str], list[str]]:
    """Faults and lines of Qwen2.5-7B on a node, whose ranks hold 14.2 GiB of weights and more of the rest."""
    recipe = Recipe(
        name="one",
        task="rlhf",
        rlhf=Rlhf(rlhf_type="grpo"),
        model=Model(model=MODEL),
        data=Data(dataset=["data.jsonl"], max_length=1024),
        grpo=Grpo(reward_funcs=("accuracy",), beta=0.0),
        parallel=Parallel(tensor_model_parallel_size=tp),
        resources=Resources(nodes=1, gpus_per_node=8),
        rollout=Rollout(vllm_mode="colocate", vllm_gpu_memory_utilization=share, **rollout),
    )
    estimate = estimate_of(recipe, SHAPE, GPU)
    return [str(one) for one in faults(recipe, SHAPE, estimate, GPU)], list(lines(recipe, SHAPE, estimate, GPU))


def test_an_engine_that_fits_is_a_line_of_the_plan() -> None:
    none, (line,) = found(0.4, sleep_level=1)
    assert not none
    assert line.startswith("H100 with the engine inside the ranks, GiB of 79.1: training ")
    assert "generating" in line and "(engine 31.6)" in line and "(engine 0.0)" in line and "more than" not in line


def test_what_cannot_fit_is_refused_with_a_cure() -> None:
    (fault,), _ = found(0.9, sleep_level=1)
    assert "does not fit on H100 while it generates: the engine's 71.2 GiB and the trainer's" in fault
    assert fault.endswith("set offload_optimizer=True and offload_model=True, or lower it")
    moved, (line,) = found(0.9, sleep_level=1, offload_model=True, offload_optimizer=True)
    assert not moved and "more than" not in line
    awake, _ = found(0.9)
    assert "while the ranks train" in awake[0] and awake[0].endswith("set sleep_level=1, or lower it")
    (small,), _ = found(0.1, sleep_level=2)
    assert "gives the engine 7.9 of 79.1 GiB on H100, less than its weights of 14.2 GiB" in small


def test_engines_elsewhere_are_not_counted() -> None:
    assert found(0.9, vllm_tensor_parallel_size=8)[0], "ranks that share an engine give it as much each"
    recipe = Recipe(name="one", task="sft", model=Model(model=MODEL))
    recipe = replace(recipe, resources=Resources(nodes=1, gpus_per_node=8))
    assert not list(lines(recipe, SHAPE, estimate_of(recipe, SHAPE, GPU), GPU))
