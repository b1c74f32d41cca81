"""Parameters, and the bytes of weights, gradients and optimizer on each rank, as megatron-core allocates them.

Trained parameters of a chunk lie in flat buffers, one of the experts and one of all else. With the distributed
optimizer (ZeRO-1, arXiv:1910.02054) each parameter starts at a multiple of 64 elements, each bucket ends at one of 128
and of the data parallel size, and each data parallel rank keeps the optimizer's state of an equal part of every bucket
(megatron-core 0.16.1, `distributed/param_and_grad_buffer.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import lcm

from megabatch.plan import weights
from megabatch.plan.adapters import beside, is_saved
from megabatch.plan.settings import Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.stages import Chunk
from megabatch.plan.weights import Kind, Weight
from megabatch.values import dataclass

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
PARAMETER_UNIT = 64
BUCKET_UNIT = 128
BUCKET_ELEMENTS, BUCKET_ELEMENTS_OF_A_RANK = 40_000_000, 1_000_000
"""If gradients are reduced during the backward pass, a bucket is closed at the larger of the two (the second times the
data parallel size); otherwise a buffer is one bucket."""


@dataclass(frozen=True, slots=True)
class RankSize:
    """What one rank holds, in elements."""

    parameters: int = 0
    """Parameters of its part of the model, including shared copies."""
    frozen: int = 0
    """Those of them that are not trained."""
    dense: int = 0
    """Buffers of trained parameters outside experts, with padding."""
    experts: int = 0
    """Buffers of the experts' trained parameters, with padding."""
    shard: int = 0
    """Optimizer state: this rank's part of both."""
    matrices: int = 0
    """Trained hidden matrices among them, which Muon updates, where a run has it."""

    def __add__(self, other: RankSize) -> RankSize:
        return RankSize(
            self.parameters + other.parameters,
            self.frozen + other.frozen,
            self.dense + other.dense,
            self.experts + other.experts,
            self.shard + other.shard,
            self.matrices + other.matrices,
        )

    def weight_bytes(self, settings: Settings) -> int:
        beside = settings.frozen_copies * self.parameters
        return (self.frozen + self.dense + self.experts + beside) * settings.weight_bytes + settings.beside_bytes

    def gradient_bytes(self, settings: Settings) -> int:
        return (self.dense + self.experts) * settings.gradient_bytes

    def optimizer_bytes(self, settings: Settings) -> int:
        """On the device. With Muon each rank has the state whole."""
        if settings.muon is not None:
            others = self.shard - self.matrices
            return self.matrices * settings.muon.state_bytes + others * settings.optimizer_bytes
        return self.shard * settings.optimizer_bytes - int(self._on_host(settings) * settings.optimizer_bytes)

    def host_bytes(self, settings: Settings) -> int:
        """Main copy, two moments in fp32, and a buffer for gradients that come and weights that go back."""
        return int(self._on_host(settings) * (12 + max(settings.gradient_bytes, settings.weight_bytes)))

    def _on_host(self, settings: Settings) -> float:
        return self.shard * settings.optimizer_offload_fraction


def rank_sizes(shape: ModelShape, settings: Settings) -> list[RankSize]:
    """One per pipeline rank; its data parallel ranks have the same sizes except for padding inside their shards."""
    sizer = _Sizer(shape, settings)
    sizes = [RankSize()] * settings.layout.pp
    for chunk in settings.chunks:
        sizes[chunk.pp_rank] += sizer.size(chunk)
    return sizes


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring tensors of one size on a rank."""

    elements: int
    count: int
    expert: bool
    trained: bool
    matrix: bool


@dataclass(frozen=True, slots=True)
class _Sum:
    """Over the tensors of a layer or of an end of the model; trained ones with their padding."""

    parameters: int
    frozen: int
    dense: int
    experts: int
    matrices: int


class _Sizer:
    """Sizes the chunks of one model in one layout; examines one layer of each kind."""

    def __init__(self, shape: ModelShape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self.unit = PARAMETER_UNIT if settings.use_distributed_optimizer else 1
        layout = settings.layout
        self.ranks = {False: layout.dp * layout.cp, True: layout.edp}
        self.kinds = _kinds(shape, settings.frozen)
        self.layers = {
            (kind, frozen): list(self._runs(weights.layer(shape, kind), frozen)) for kind, frozen in set(self.kinds)
        }
        self.sums = {kind: self._sum(runs) for kind, runs in self.layers.items()}

    def size(self, chunk: Chunk) -> RankSize:
        before, behind, shared = ends(self.shape, self.settings, chunk)
        around = list(self._runs([*before, *behind], self.settings.frozen))
        mtp = list(self._runs(weights.mtp_layer(self.shape))) * chunk.mtp_layers if chunk.mtp_layers else []
        apart = self._sum(self._runs(shared, self.settings.frozen))
        counted = Counter(self.kinds[layer] for layer in chunk.layers)
        parts = [(self._sum([*around, *mtp]), 1), *((self.sums[kind], count) for kind, count in counted.items())]
        if self.settings.overlap_grad_reduce and chunk.pp_rank == chunk.vp_stage == 0:
            inside = [run for layer in chunk.layers for run in self.layers[self.kinds[layer]]]
            ends_ = [list(self._runs(end, self.settings.frozen)) for end in (before, behind)]
            runs = [*ends_[0], *inside, *mtp, *ends_[1]]
            dense, experts = (self._bucketed(runs, expert=expert) for expert in (False, True))
        else:
            dense = self._bucket(sum(part.dense * count for part, count in parts), expert=False)
            experts = self._bucket(sum(part.experts * count for part, count in parts), expert=True)
        dense += self._bucket(apart.dense, expert=False)
        return RankSize(
            parameters=apart.parameters + sum(part.parameters * count for part, count in parts),
            frozen=apart.frozen + sum(part.frozen * count for part, count in parts),
            dense=dense,
            experts=experts,
            shard=self._shard(dense, expert=False) + self._shard(experts, expert=True),
            matrices=sum(part.matrices * count for part, count in parts),
        )

    def _runs(self, found: Iterable[Weight], frozen: frozenset[str] = frozenset()) -> Iterator[_Run]:
        layout, lora = self.settings.layout, self.settings.lora
        for weight in found:
            if not weight.trained:
                continue
            count = weight.experts // layout.ep if weight.experts else 1
            trained = weight.name not in frozen and (lora is None or is_saved(weight.name, lora))
            shard, matrix = weight.shard(tp=layout.tp, etp=layout.etp), weight.is_hidden_matrix
            yield _Run(shard, count, bool(weight.experts), trained, matrix)
            for added in beside(weight, lora) if lora is not None else ():
                yield _Run(added.shard(tp=layout.tp, etp=layout.etp), count, bool(added.experts), True, False)

    def _sum(self, runs: Iterable[_Run]) -> _Sum:
        found = list(runs)

        def total(size: Callable[[int], int], wanted: Callable[[_Run], bool]) -> int:
            return sum(size(run.elements) * run.count for run in found if wanted(run))

        return _Sum(
            parameters=total(int, lambda run: True),
            frozen=total(int, lambda run: not run.trained),
            dense=total(self._aligned, lambda run: run.trained and not run.expert),
            experts=total(self._aligned, lambda run: run.trained and run.expert),
            matrices=total(int, lambda run: run.trained and run.matrix),
        )

    def _aligned(self, elements: int) -> int:
        return -(-elements // self.unit) * self.unit

    def _bucket(self, elements: int, *, expert: bool) -> int:
        """With the padding behind it."""
        if not self.settings.use_distributed_optimizer:
            return elements
        unit = lcm(self.ranks[expert], BUCKET_UNIT)
        return -(-elements // unit) * unit

    def _bucketed(self, runs: Iterable[_Run], *, expert: bool) -> int:
        """A buffer that is filled from the last tensor to the first, bucket by bucket."""
        full = max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_OF_A_RANK * self.settings.layout.dp)
        closed = filled = 0
        for run in reversed([run for run in runs if run.trained and run.expert == expert]):
            size, left = self._aligned(run.elements), run.count
            while left:
                # the last tensor's own end decides, before the next one's alignment
                taken = min(left, max(1, -(-(full - filled - run.elements) // size) + 1))
                filled, left = filled + taken * size, left - taken
                if filled - size + run.elements >= full:
                    closed, filled = closed + self._bucket(filled, expert=expert), 0
        return closed + self._bucket(filled, expert=expert)

    def _shard(self, elements: int, *, expert: bool) -> int:
        return elements // self.ranks[expert] if self.settings.use_distributed_optimizer else elements


def _kinds(shape: ModelShape, frozen: frozenset[str]) -> list[tuple[Kind, frozenset[str]]]:
    """Of each layer its kind and which of its tensors are frozen, by their names within it."""
    inside: dict[int, set[str]] = {}
    for name in frozen:
        if match := _LAYER.match(name):
            inside.setdefault(int(match[1]), set()).add(match[2])
    return [(kind, frozenset(inside.get(i, ()))) for i, kind in enumerate(weights.kinds(shape))]


def ends(shape: ModelShape, settings: Settings, chunk: Chunk) -> tuple[list[Weight], list[Weight], list[Weight]]:
    """What a chunk holds before and after its layers, and which of these tensors have a bucket of their own.

    Copies of the embedding on the first stage and on the one that has the tied output layer, or layers of multi-token
    prediction, are kept equal; each is a bucket, so that all of them are cut alike.
    """
    tied = shape.ties_output_layer
    pipelined = settings.layout.pp > 1
    vocabulary = weights.embedding(shape, vocab_size=settings.vocab_size)
    before: list[Weight] = []
    behind: list[Weight] = []
    shared: list[Weight] = []
    if chunk.embedding or chunk.mtp_layers:
        copied = pipelined and (tied or settings.mtp_layers > 0)
        (shared if copied else before).append(vocabulary)
    if chunk.loss:
        behind.append(weights.final_norm(shape))
        output = weights.output_layer(shape, vocab_size=settings.vocab_size)
        if not tied:
            behind.append(output)
        elif not chunk.embedding:
            (behind if chunk.mtp_layers else shared).append(output)
        if shape.head_bias:
            behind.append(weights.head_bias(shape))
    return before, behind, shared
