"""Memory of each pipeline stage's ranks at the peak of a step."""

from __future__ import annotations

from collections.abc import Sequence

from megabatch.plan import weights
from megabatch.plan.activations import LayerActivations, layer_activations, stream
from megabatch.plan.figures import GIB, MemoryEstimate
from megabatch.plan.gpus import Gpu
from megabatch.plan.rank_size import RankSize
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.stages import Chunk
from megabatch.values import dataclass

LOSS_CHUNK = 1 << 24
"""Number of logits that the loss converts to fp32 at a time (`CHUNK_ELEMENTS` of the trainer's `ops/vocab.py`)."""

CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA's context with the kernels of all libraries (about 0.5 GiB), cuBLAS's workspace (32 MiB on Hopper for each
handle and stream, 8 MiB before: PyTorch's notes on CUDA semantics), and Transformer Engine's for grouped products (as
much for each of its four streams)."""
NCCL_BYTES_OF_A_GROUP = int(0.25 * GIB)
"""NCCL's buffers for each group of ranks that a rank is in: 4 MiB (NCCL_BUFFSIZE) for each of up to 32 channels, to
and from a neighbour."""
FRAGMENTATION = 0.05
"""Fraction of temporary memory that the allocator cannot use; with `expandable_segments`. Calibrated."""

MARGIN = 0.1
"""Fraction of a GPU's memory that layouts leave free for errors of the estimates. The worst of the published runs used
1.07 times its estimate if its figure means decimal gigabytes, and 1.15 times if it means GiB. Overheads of known size
(CUDA's context, NCCL, workspaces, usual fragmentation) are in the estimates, as `framework`."""


def usable_gib(gpu: Gpu) -> float:
    """Memory that a layout may use on a GPU by default."""
    return (1 - MARGIN) * gpu.memory_gib


def stage_memory(shape: ModelShape, settings: Settings, sizes: list[RankSize]) -> list[MemoryEstimate]:
    """One for each pipeline stage. Args: sizes: `rank_size.rank_sizes`."""
    return [_stage(settings, peak, size) for peak, size in zip(_peaks(shape, settings), sizes, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Peak:
    """Bytes of one stage's activations."""

    stored: float
    logits: float
    temporary: float
    """On top of both, in a training step."""
    without_gradients: float
    """Of a pass that keeps nothing, with as many samples in a micro-batch as in training."""

    @property
    def step(self) -> float:
        return self.stored + self.logits + self.temporary


def most_without_gradients(shape: ModelShape, settings: Settings, *, other: ModelShape, others: Settings) -> int:
    """The most samples in a micro-batch of passes without gradients that take no more than a training step.

    Args: other, others: of the model that the passes are of, which is not split as the trained one where these are not
    its own; each of its stages may then lie beside any of the trained model's.
    """
    steps = [peak.step for peak in _peaks(shape, settings)]
    passes = [peak.without_gradients for peak in _peaks(other, others)]
    if others.layout != settings.layout or other != shape:
        steps, passes = [min(steps)], [max(passes)]
    fitting = (others.micro_batch_size * step / each for step, each in zip(steps, passes, strict=True) if each)
    return int(min(fitting, default=others.micro_batch_size))


def _peaks(shape: ModelShape, settings: Settings) -> list[_Peak]:
    """One for each pipeline stage."""
    kinds = weights.kinds(shape)
    by_kind = {kind: layer_activations(shape, settings, kind) for kind in set(kinds)}
    layers = [by_kind[kind] for kind in kinds]
    return [_peak(shape, settings, layers, pp_rank=rank) for rank in range(settings.layout.pp)]


def _peak(shape: ModelShape, settings: Settings, layers: Sequence[LayerActivations], *, pp_rank: int) -> _Peak:
    chunks = [chunk for chunk in settings.chunks if chunk.pp_rank == pp_rank]
    flying = in_flight(settings, pp_rank)
    stored = sum(count * _stored(shape, settings, layers, chunk) for chunk, count in zip(chunks, flying, strict=True))
    logits = _logits(shape, settings) if any(chunk.loss for chunk in chunks) else 0.0
    passing = max((_passing(settings, layers, chunk) for chunk in chunks), default=0.0)
    return _Peak(
        stored=stored,
        logits=logits,
        # the loss frees its memory before the layers' backward pass begins
        temporary=max(0.0, passing - logits),
        without_gradients=_without_gradients(layers, chunks, logits),
    )


def _stage(settings: Settings, peak: _Peak, size: RankSize) -> MemoryEstimate:
    inferring = settings.infer_batch_size / settings.micro_batch_size * peak.without_gradients
    temporary = peak.temporary + max(0.0, inferring - peak.step)
    groups = sum(ways > 1 for ways in _group_sizes(settings))
    dynamic = peak.stored + peak.logits + temporary
    return MemoryEstimate(
        weights=size.weight_bytes(settings),
        gradients=size.gradient_bytes(settings),
        optimizer=size.optimizer_bytes(settings),
        activations=int(peak.stored),
        logits=int(peak.logits),
        temporary=int(temporary),
        framework=CONTEXT_BYTES + groups * NCCL_BYTES_OF_A_GROUP + int(FRAGMENTATION * dynamic),
    )


def in_flight(settings: Settings, pp_rank: int) -> list[int]:
    """For each chunk, the most micro-batches whose activations a stage holds at once.

    1F1B (arXiv:2104.04473, section 2.2): a stage runs ahead by the number of stages after it. Interleaved: twice
    as far, and a group of micro-batches for each chunk but the last (megatron-core's `schedules.py`).
    """
    layout = settings.layout
    count, behind = layout.num_microbatches, layout.pp - pp_rank - 1
    if layout.vp == 1:
        return [min(behind + 1, count)]
    group = settings.microbatch_group_size or layout.pp
    ahead = min(2 * behind + (layout.vp - 1) * group + 1, count * layout.vp)
    rounds, rest = divmod(ahead, group * layout.vp)
    return [rounds * group + min(max(rest - stage * group, 0), group) for stage in range(layout.vp)]


def _stored(shape: ModelShape, settings: Settings, layers: Sequence[LayerActivations], chunk: Chunk) -> float:
    """Bytes that one micro-batch stores in a chunk."""
    rows = stream(shape, settings)
    found = [layers[number] for number in chunk.layers] + [layers[-1]] * chunk.mtp_layers
    unit = settings.recompute_num_layers or 1
    if settings.recompute_granularity != "full":
        stored = sum(layer.kept for layer in found)
    elif settings.recompute_method == "block":
        stored = rows * len(found[:unit]) + sum(layer.whole for layer in found[unit:])
    else:
        stored = rows * -(-len(found) // unit)
    if chunk.loss:
        stored += 2 * rows  # the final norm's input and output
    elif settings.layout.pp > 1 and settings.layout.vp > 1:
        stored += rows  # what was sent on; given back where the schedule waits for its sends
    return stored + chunk.mtp_layers * 5 * rows  # two norms, their joined output twice as wide, the norm behind


def _passing(settings: Settings, layers: Sequence[LayerActivations], chunk: Chunk) -> float:
    """Peak of a chunk's forward or backward pass on top of what is stored."""
    found = {id(layers[number]): layers[number] for number in chunk.layers}.values()
    full, unit = settings.recompute_granularity == "full", 1
    if full and settings.recompute_method == "uniform":
        unit = min(settings.recompute_num_layers or 1, len(chunk.layers))
    return max(
        (layer.working + (unit * layer.whole if full else layer.whole - layer.kept) for layer in found),
        default=0.0,
    )


def _without_gradients(layers: Sequence[LayerActivations], chunks: Sequence[Chunk], logits: float) -> float:
    """Peak of a pass that keeps nothing: all of one layer's activations, or the logits without their gradient."""
    found = (layers[number] for chunk in chunks for number in chunk.layers)
    return max(max((layer.passing for layer in found), default=0.0), logits / 2)


def _logits(shape: ModelShape, settings: Settings) -> float:
    """Logits and their gradient in the run's precision, plus the loss's fp32 chunk unless that is fp32."""
    labels = shape.num_labels
    columns = settings.vocab_size / settings.layout.tp if labels is None else labels or shape.hidden_size
    count = settings.micro_batch_tokens * columns
    chunk = 4 * min(count, LOSS_CHUNK) if settings.weight_bytes < 4 else 0
    return 2 * settings.weight_bytes * count + chunk


def _group_sizes(settings: Settings) -> tuple[int, ...]:
    layout = settings.layout
    experts = (layout.ep * layout.etp, layout.edp) if layout.ep * layout.etp > 1 else (1, 1)
    return (layout.tp, layout.cp, layout.dp * layout.cp, layout.pp, *experts)
