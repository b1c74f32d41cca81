"""Seconds that a micro-batch takes in one layer on one rank, and on the links around it.

Matrix products and attention run at a fraction of the tensor cores' peak, all else at a fraction of the memory
bandwidth (arXiv:2104.04473 for the operations). The fractions are the same for every model and layout.
"""

from __future__ import annotations

from megabatch.plan import weights
from megabatch.plan.activations import keys_values, stream
from megabatch.plan.communication import all_to_all_s, groups, ring_s
from megabatch.plan.flops import attention_flops
from megabatch.plan.gpus import Gpu
from megabatch.plan.routing import EXPERT_IMBALANCE, routed_tokens
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.weights import Kind, Weight
from megabatch.values import dataclass

MATMUL_EFFICIENCY = 0.7
"""Fraction of the peak that large matrix products reach. Calibrated (docs/planning.md)."""
GROUPED_EFFICIENCY = 0.5
"""The same for grouped products of a rank's experts."""
ATTENTION_EFFICIENCY = 0.5
"""The same for flash attention (arXiv:2307.08691, figure 5)."""
MEMORY_EFFICIENCY = 0.8
"""Fraction of the memory bandwidth that norms, rotations, activations and sums reach."""
UNFUSED_PERMUTATION = 8.0
"""Slowdown of sorting tokens by expert and back without `moe_permute_fusion`. Calibrated."""
EXPERTS_HOST_S = 2e-3
"""Seconds per pass through a layer of experts in which the host waits for token counts and launches. Calibrated."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of flash attention's backward pass over its forward pass: five matrix products against two."""
OVERLAP = 0.8
"""Fraction of a communication that overlap hides."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds for one micro-batch: computation, and the communication that it waits for."""

    compute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.compute + other.compute, self.tp + other.tp, self.cp + other.cp, self.ep + other.ep)

    def times(self, factor: float) -> Seconds:
        return Seconds(self.compute * factor, self.tp * factor, self.cp * factor, self.ep * factor)

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.cp + self.ep


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    forward: Seconds
    backward: Seconds
    """Without recomputation."""
    selective: Seconds
    """Time added by the run's selective recomputation."""


def layer_seconds(shape: ModelShape, settings: Settings, kind: Kind, gpu: Gpu) -> LayerSeconds:
    linear, experts = _matmul_s(shape, settings, weights.layer(shape, kind), gpu)
    attention = _attention_s(shape, settings, kind, gpu)
    touched, sorted_ = _memory_s(shape, settings, kind, gpu)
    host = EXPERTS_HOST_S if kind[0] else 0.0
    links, around = _links(shape, settings, kind, gpu), _around_s(shape, settings, kind, gpu)
    forward = Seconds(linear + experts + attention + touched + sorted_ + host, cp=around) + links
    # frozen weights have no gradients of their own
    passes = 1.0 if settings.lora else 2.0
    compute = passes * (linear + experts) + ATTENTION_BACKWARD * attention + 2 * touched + sorted_ + host
    compute += _accumulated_s(settings, weights.layer(shape, kind), gpu)
    # ours gathers keys and values again, and then scatters their gradients
    backward = Seconds(compute, cp=around * (1 if settings.transformer_engine else 2)) + links
    return LayerSeconds(forward, backward, _selective(settings, kind, forward, attention, linear))


def _selective(settings: Settings, kind: Kind, forward: Seconds, attention: float, linear: float) -> Seconds:
    if settings.recompute_granularity != "selective":
        return Seconds()
    modules, (moe, _) = settings.recompute_modules, kind
    again = Seconds(attention, cp=forward.cp) if "core_attn" in modules else Seconds()
    if "moe" in modules and moe:
        again += Seconds(forward.compute - attention - linear, ep=forward.ep)
    if "mlp" in modules and not moe:
        again += Seconds(linear / 2, tp=forward.tp / 2)
    return again


def head_seconds(shape: ModelShape, settings: Settings, gpu: Gpu) -> LayerSeconds:
    """The output layer with its loss."""
    head = weights.output_layer(shape, vocab_size=settings.vocab_size)
    product, _ = _matmul_s(shape, settings, (head,), gpu)
    logits = settings.micro_batch_tokens * head.rows / (settings.layout.tp if head.split == "vocab" else 1)
    passed = logits * _LOGIT_PASSES * 4 / _memory_bytes_per_s(gpu)
    passes = 1.0 if settings.lora else 2.0
    backward = Seconds(passes * product + passed + _accumulated_s(settings, (head,), gpu))
    return LayerSeconds(Seconds(product + passed), backward, Seconds())


_LOGIT_PASSES = 4
"""How often fp32 logits are read or written forward, and their gradients backward."""


def _matmul_s(shape: ModelShape, settings: Settings, found: tuple[Weight, ...], gpu: Gpu) -> tuple[float, float]:
    """Forward seconds of matrix products outside experts, and of the experts'."""
    layout, tokens = settings.layout, settings.micro_batch_tokens
    dense = experts = 0.0
    for weight in found:
        if weight.cols is None:
            continue
        if weight.experts:
            experts += 2.0 * weight.shard(tp=layout.tp, etp=layout.etp) * routed_tokens(shape, settings)
        else:
            own = tokens / settings.sp if weight.split == "replicated" else tokens
            dense += 2.0 * weight.shard(tp=layout.tp, etp=layout.etp) * own
    peak = gpu.peak_tflops * 1e12
    return dense / peak / MATMUL_EFFICIENCY, experts / peak / GROUPED_EFFICIENCY


def _accumulated_s(settings: Settings, found: tuple[Weight, ...], gpu: Gpu) -> float:
    """Every micro-batch's gradients are added to those before: read and written."""
    if settings.lora:
        return 0.0
    layout = settings.layout
    held = sum(
        weight.shard(tp=layout.tp, etp=layout.etp) * (weight.experts // layout.ep if weight.experts else 1)
        for weight in found
    )
    return 2 * held * settings.gradient_bytes / _memory_bytes_per_s(gpu)


def _attention_s(shape: ModelShape, settings: Settings, kind: Kind, gpu: Gpu) -> float:
    flops = settings.micro_batch_tokens * attention_flops(shape, kind, mean_length=settings.mean_length)
    return flops / settings.layout.tp / (gpu.peak_tflops * 1e12) / ATTENTION_EFFICIENCY


def _memory_s(shape: ModelShape, settings: Settings, kind: Kind, gpu: Gpu) -> tuple[float, float]:
    """Forward seconds of memory-bound work: element-wise operations, and sorting tokens by expert."""
    tokens, size, tp = settings.micro_batch_tokens, settings.weight_bytes, settings.layout.tp
    bandwidth = _memory_bytes_per_s(gpu)
    # two norms read and write the stream, two sums read two and write one
    touched = 10 * stream(shape, settings)
    channels = (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels
    touched += tokens * size * 2 * channels * (1 + shape.qk_layernorm) / tp  # rotation and norms of queries and keys
    if not kind[0]:
        return (touched + tokens * size * 3 * shape.ffn_hidden_size / tp) / bandwidth, 0.0
    routed = routed_tokens(shape, settings)
    touched += routed * size * 3 * (shape.moe_ffn_hidden_size or 0) / settings.layout.etp
    touched += tokens * size * 3 * (shape.moe_shared_expert_intermediate_size or 0) / tp
    # each copy is read and written where it leaves, where it arrives, and both on the way back
    moved = routed * size * shape.hidden_size * 8
    return touched / bandwidth, moved * (1.0 if settings.moe_permute_fusion else UNFUSED_PERMUTATION) / bandwidth


def _memory_bytes_per_s(gpu: Gpu) -> float:
    return gpu.memory_gb_s * 1e9 * MEMORY_EFFICIENCY


def _links(shape: ModelShape, settings: Settings, kind: Kind, gpu: Gpu) -> Seconds:
    """Of a pass through a layer, forward or backward."""
    found, node = groups(settings), settings.gpus_per_node
    moe, _ = kind
    rows = settings.micro_batch_tokens * shape.hidden_size * settings.weight_bytes
    # gathered in front of and scattered behind attention, and the same around a dense MLP or shared experts
    turns = 2 if moe and not shape.moe_shared_expert_intermediate_size else 4
    tp = turns * ring_s(gpu, found["tp"], rows, gpus_per_node=node)
    if settings.tp_comm_overlap:
        tp *= 1 - OVERLAP
    return Seconds(tp=tp, ep=_experts_s(shape, settings, gpu) if moe else 0.0)


def _around_s(shape: ModelShape, settings: Settings, kind: Kind, gpu: Gpu) -> float:
    """Sends a layer's keys and values once around the context parallel ranks.

    Transformer Engine overlaps this with attention to the ones it already has; our attention gathers them first.
    """
    if kind[1]:
        return 0.0
    sent = keys_values(shape, settings) * settings.layout.cp
    around = ring_s(gpu, groups(settings)["cp"], sent, gpus_per_node=settings.gpus_per_node)
    if not settings.transformer_engine:
        return around
    return max(around * (1 - OVERLAP), around - _attention_s(shape, settings, kind, gpu))


def _experts_s(shape: ModelShape, settings: Settings, gpu: Gpu) -> float:
    """Sends tokens to their experts and back; expert tensor parallelism adds a gather and a scatter."""
    found, node = groups(settings), settings.gpus_per_node
    copy = shape.hidden_size * settings.weight_bytes
    sent = settings.micro_batch_tokens / settings.sp * (shape.moe_router_topk or 0) * copy * EXPERT_IMBALANCE
    gathered = routed_tokens(shape, settings) * copy
    return 2 * (
        all_to_all_s(gpu, found["ep"], sent, gpus_per_node=node)
        + ring_s(gpu, found["etp"], gathered, gpus_per_node=node)
    )
