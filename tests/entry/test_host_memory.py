"""Host memory of an offloaded optimizer: counted for a node, and refused where the job asks for less."""

from __future__ import annotations

from typing import Any

from megabatch import Data, Model, Optimizer, Parallel, Recipe, Resources
from megabatch.converters.families import family_of
from megabatch.entry.host_memory import faults, lines, offloaded_gib
from megabatch.plan.published_models import KNOWN_MODELS

MODEL = "Qwen/Qwen2.5-7B"
SHAPE = family_of(KNOWN_MODELS[MODEL]).shape(KNOWN_MODELS[MODEL])


def made(mem_gib: int | None = None, **optimizer: Any) -> Recipe:
    return Recipe(
        name="one",
        task="sft",
        model=Model(model=MODEL),
        data=Data(dataset=["data.jsonl"], max_length=1024),
        parallel=Parallel(tensor_model_parallel_size=2),
        optimizer=Optimizer(**optimizer),
        resources=Resources(nodes=2, gpus_per_node=8, mem_gib=mem_gib),
    )


def test_a_node_holds_the_parts_of_its_ranks() -> None:
    """7.6 B parameters at 16 bytes (main weight, two moments, gradient), half of them on each of two nodes."""
    needs = offloaded_gib(made(optimizer_cpu_offload=True), SHAPE)
    assert abs(needs - 7_615_616_512 * 16 / 2 / 2**30) < 1
    half = offloaded_gib(made(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5), SHAPE)
    assert abs(half - needs / 2) < 0.01
    assert list(lines(made(optimizer_cpu_offload=True), SHAPE)) == [
        f"optimizer_cpu_offload: {needs:.1f} GiB of host memory on a node"
    ]


def test_nothing_is_counted_without_offloading() -> None:
    assert offloaded_gib(made(1), SHAPE) == 0
    assert not list(lines(made(1), SHAPE)) and not list(faults(made(1), SHAPE))


def test_too_little_memory_is_refused() -> None:
    (fault,) = faults(made(40, optimizer_cpu_offload=True), SHAPE)
    assert str(fault) == (
        "resources.mem_gib=40 is less than the 56.7 GiB that optimizer_cpu_offload keeps on a node; raise it, or "
        "lower optimizer_offload_fraction"
    )
    assert not list(faults(made(64, optimizer_cpu_offload=True), SHAPE))
