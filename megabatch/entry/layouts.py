"""Every layout of a recipe on a number of GPUs, with its verdict."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

from megabatch.config.recipe import Recipe
from megabatch.config.rules import parallelism, pipeline
from megabatch.config.rules.check import check
from megabatch.config.rules.fields import unbuilt_fields
from megabatch.entry.estimate import Verdict, verdict_of
from megabatch.errors import Fault
from megabatch.plan.gpus import Gpu
from megabatch.plan.layouts import Choice, choices
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

GPUS_PER_NODE = 8
"""For a recipe that asks for none."""


@dataclass(frozen=True, slots=True)
class JudgedLayout:
    """A layout with its verdict."""

    choice: Choice
    verdict: Verdict


def judged_layouts(
    recipe: Recipe, shape: ModelShape, *, gpus: int, gpu: Gpu, gpu_memory_gib: float | None = None
) -> list[JudgedLayout]:
    """Runnable layouts first, fastest first; then the others, each with its reason.

    Everything in the recipe but layout, micro-batch and nodes stays as it is.
    """
    base = on_gpus(recipe, gpus)
    screen = _Screen(base, shape)
    judged = []
    for choice in choices(shape, world_size=gpus, global_batch_size=recipe.batch.global_batch_size):
        fault = screen.fault(choice)
        if fault is not None:
            verdict = Verdict(keep=False, reason=str(fault), estimate=None)
        else:
            laid = with_choice(base, choice)
            verdict = verdict_of(laid, shape, gpu=gpu, gpu_memory_gib=gpu_memory_gib, variant_of=base)
        judged.append(JudgedLayout(choice, verdict))
    return sorted(judged, key=_rank)


_LAID_OUT = ("parallel.", "resources.", "batch.", "moe.", "recompute.")
"""Groups whose rules depend on a layout."""


def faults_of_all(recipe: Recipe, shape: ModelShape, *, gpus: int) -> list[Fault]:
    """Broken rules that no layout can fix; features that are not built yet can still be planned."""
    base = on_gpus(recipe, gpus)
    unbuilt = {str(fault) for fault in unbuilt_fields(base)}
    found = check(base, shape)
    return [fault for fault in found if not fault.field.startswith(_LAID_OUT) and str(fault) not in unbuilt]


def _rank(judged: JudgedLayout) -> tuple[bool, float]:
    estimate = judged.verdict.estimate
    return not judged.verdict.keep, estimate.step.total_s if estimate else 0.0


def on_gpus(recipe: Recipe, gpus: int) -> Recipe:
    """The recipe on that many GPUs, and on as many nodes as they fill."""
    a_node = min(gpus, recipe.resources.gpus_per_node or GPUS_PER_NODE)
    resources = replace(recipe.resources, nodes=gpus // a_node, gpus_per_node=a_node, tasks_per_node=None)
    return replace(recipe, resources=resources)


def with_choice(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with this layout; keeps the recipe's own split of layers if the number of stages is the same."""
    parallel = recipe.parallel
    own_split = choice.vp == 1 and choice.pp == parallel.pipeline_model_parallel_size
    changed = replace(
        parallel,
        tensor_model_parallel_size=choice.tp,
        sequence_parallel=choice.tp > 1,
        tp_comm_overlap=parallel.tp_comm_overlap and choice.tp > 1,
        pipeline_model_parallel_size=choice.pp,
        context_parallel_size=choice.cp,
        expert_model_parallel_size=choice.ep,
        expert_tensor_parallel_size=choice.etp,
        num_virtual_stages_per_pipeline_rank=choice.vp if choice.vp > 1 else None,
        num_layers_per_virtual_pipeline_stage=None,
        microbatch_group_size_per_virtual_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
        decoder_first_pipeline_num_layers=parallel.decoder_first_pipeline_num_layers if own_split else None,
        decoder_last_pipeline_num_layers=parallel.decoder_last_pipeline_num_layers if own_split else None,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split and choice.pp > 1,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split and choice.pp > 1,
        distributed_backend="nccl",
    )
    return replace(recipe, parallel=changed, batch=replace(recipe.batch, micro_batch_size=choice.micro_batch_size))


class _Screen:
    """Rules about a single size of a layout, checked once per value: they reject most layouts."""

    def __init__(self, recipe: Recipe, shape: ModelShape) -> None:
        self.recipe, self.shape = recipe, shape
        self.known: dict[tuple[str, Hashable], Fault | None] = {}

    def fault(self, choice: Choice) -> Fault | None:
        rules: tuple[tuple[str, Hashable, Callable[[Recipe], Iterator[Fault]]], ...] = (
            ("tp", choice.tp, lambda recipe: parallelism.tensor_parallel_divides(recipe, self.shape, None)),
            ("cp", (choice.tp, choice.cp), lambda recipe: parallelism.sequence_divides(recipe, self.shape, None)),
            ("pp", (choice.pp, choice.vp), lambda recipe: pipeline.layers_divide_evenly(recipe, self.shape, None)),
            ("ep", (choice.ep, choice.etp), lambda recipe: parallelism.experts_divide(recipe, self.shape, None)),
        )
        for name, value, rule in rules:
            if (name, value) not in self.known:
                self.known[name, value] = next(rule(with_choice(self.recipe, choice)), None)
            if fault := self.known[name, value]:
                return fault
        return None
