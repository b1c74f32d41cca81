"""Seconds of a step: micro-batches through the pipeline, gradients and weights between replicas, the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megabatch.plan import weights
from megabatch.plan.activations import stream
from megabatch.plan.communication import groups, ring_s, send_s
from megabatch.plan.figures import StepEstimate
from megabatch.plan.flops import training_flops
from megabatch.plan.gpus import Gpu
from megabatch.plan.layer_time import MEMORY_EFFICIENCY, OVERLAP, LayerSeconds, Seconds, head_seconds, layer_seconds
from megabatch.plan.muon import orthogonalizing_s
from megabatch.plan.rank_size import RankSize
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.stages import Chunk
from megabatch.plan.weights import Kind

HOST_LINK_BYTES_S = 20e9
"""Between a GPU and host memory, one way (PCIe 4.0 x16 has 32 GB/s). Assumed, not measured."""
HOST_BYTES_S = 20e9
"""Of host memory to Adam on one rank's cores. Assumed, not measured."""


def step_time(shape: ModelShape, settings: Settings, sizes: list[RankSize], gpu: Gpu) -> StepEstimate:
    """Args: sizes: `rank_size.rank_sizes`."""
    layout = settings.layout
    kinds = weights.kinds(shape)
    layers = {kind: layer_seconds(shape, settings, kind, gpu) for kind in set(kinds)}
    head = head_seconds(shape, settings, gpu)
    stages = [_stage(settings, kinds, layers, head, pp_rank=rank) for rank in range(layout.pp)]
    totals = [forward.total + backward.total for forward, backward in stages]
    slowest = max(range(layout.pp), key=totals.__getitem__)
    forward, backward = stages[slowest]
    running = (forward + backward).times(layout.num_microbatches)
    heaviest = max(sizes, key=lambda size: size.dense + size.experts)
    tokens = settings.row_tokens * settings.micro_batch_size * layout.dp * layout.num_microbatches
    return StepEstimate(
        compute_s=running.compute,
        # (pp - 1) / vp times a micro-batch's time if all stages take equally long (arXiv:2104.04473, section 2.2)
        bubble_s=(sum(totals) - totals[slowest]) / layout.vp,
        optimizer_s=_optimizer_s(settings, heaviest, gpu) + orthogonalizing_s(shape, settings, gpu),
        communication_s={
            "tp": running.tp,
            "cp": running.cp,
            "ep": running.ep,
            "pp": _between_stages_s(shape, settings, gpu),
            "dp": _between_replicas_s(settings, heaviest, gpu, forward=forward.total, backward=backward.total),
        },
        tokens=tokens,
        model_flops=training_flops(shape, tokens=tokens, mean_length=settings.mean_length),
        peak_flops=gpu.peak_tflops * 1e12 * layout.world_size,
    )


def _stage(
    settings: Settings,
    kinds: Sequence[Kind],
    layers: Mapping[Kind, LayerSeconds],
    head: LayerSeconds,
    *,
    pp_rank: int,
) -> tuple[Seconds, Seconds]:
    """Forward and backward seconds of one micro-batch through all chunks of a stage."""
    forward = backward = Seconds()
    for chunk in settings.chunks:
        if chunk.pp_rank == pp_rank:
            ahead, back = _chunk(settings, kinds, layers, chunk)
            heads = chunk.loss + chunk.mtp_layers
            forward += ahead + head.forward.times(heads)
            backward += back + head.backward.times(heads)
    return forward, backward


def _chunk(
    settings: Settings, kinds: Sequence[Kind], layers: Mapping[Kind, LayerSeconds], chunk: Chunk
) -> tuple[Seconds, Seconds]:
    held = [kinds[number] for number in chunk.layers] + [kinds[-1]] * chunk.mtp_layers
    again = len(held) if settings.recompute_granularity == "full" else 0
    if settings.recompute_method == "block":
        again = min(again, settings.recompute_num_layers or 1)
    forward = backward = Seconds()
    for kind in set(held):
        layer, count = layers[kind], held.count(kind)
        forward += layer.forward.times(count)
        backward += (layer.backward + layer.selective).times(count) + layer.forward.times(held[:again].count(kind))
    return forward, backward


def _between_stages_s(shape: ModelShape, settings: Settings, gpu: Gpu) -> float:
    """Sends activations and gradients from stage to stage; an interleaved pipeline sends more, but overlaps it."""
    group, layout = groups(settings)["pp"], settings.layout
    once = send_s(gpu, group, stream(shape, settings), gpus_per_node=settings.gpus_per_node)
    hidden = 1 - OVERLAP if layout.vp > 1 else 1.0
    return 2 * layout.num_microbatches * layout.vp * once * hidden


def _between_replicas_s(settings: Settings, size: RankSize, gpu: Gpu, *, forward: float, backward: float) -> float:
    """Scatters gradients and gathers new weights; without the distributed optimizer, gathers gradients instead."""
    found, node = groups(settings), settings.gpus_per_node
    gathered = settings.weight_bytes if settings.use_distributed_optimizer else settings.gradient_bytes

    def total(size_of_element: int) -> float:
        return ring_s(gpu, found["dp"], size.dense * size_of_element, gpus_per_node=node) + ring_s(
            gpu, found["edp"], size.experts * size_of_element, gpus_per_node=node
        )

    reduce, gather = total(settings.gradient_bytes), total(gathered)
    if settings.overlap_grad_reduce:
        reduce = max(reduce * (1 - OVERLAP), reduce - backward)
    if settings.overlap_param_gather:
        gather = max(gather * (1 - OVERLAP), gather - forward)
    return reduce + gather


def _optimizer_s(settings: Settings, size: RankSize, gpu: Gpu) -> float:
    """Gradients are read twice (their norm, the update), state is read and written, weights are written.

    What is in host memory is updated there, one parameter after the other, while the device updates the rest.
    """
    fraction = settings.optimizer_offload_fraction
    moved = size.shard * (1 - fraction) * (2 * settings.gradient_bytes + settings.weight_bytes)
    moved += 2 * size.optimizer_bytes(settings)
    device = moved / (gpu.memory_gb_s * 1e9 * MEMORY_EFFICIENCY)
    links = (settings.gradient_bytes + settings.weight_bytes) / HOST_LINK_BYTES_S
    host = 2 * (12 + settings.gradient_bytes) / HOST_BYTES_S
    return max(device, size.shard * fraction * (links + host))
