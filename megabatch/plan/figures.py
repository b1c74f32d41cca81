"""The figures of an estimate: memory of a rank, seconds of a step."""

from __future__ import annotations

from collections.abc import Mapping

from megabatch.values import dataclass

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Activations saved for the backward pass, over all micro-batches in flight, without the loss."""
    logits: int
    """Output and loss, on the last pipeline stage."""
    temporary: int
    """Temporary buffers on top of these: gathered rows, exchanged tokens, gradients of activations."""
    framework: int
    """CUDA context, NCCL, workspaces, and what the allocator cannot use."""

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.temporary
            + self.framework
        )

    @property
    def total_gib(self) -> float:
        return self.total / GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEstimate:
    """Seconds of one optimizer step, on the rank that takes longest."""

    compute_s: float
    """Forward, backward and recomputation."""
    bubble_s: float
    """Waiting for other pipeline stages."""
    optimizer_s: float
    communication_s: Mapping[str, float]
    """Exposed communication (not overlapped with computation) by kind: tp, cp, ep, pp, dp."""
    tokens: int
    """Tokens of a step, over all ranks."""
    model_flops: float
    """Of a step, over all ranks; recomputation not counted."""
    peak_flops: float
    """Peak FLOP/s of all ranks together."""

    @property
    def total_s(self) -> float:
        return self.compute_s + self.bubble_s + self.optimizer_s + sum(self.communication_s.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (arXiv:2204.02311): the model's own FLOPs as a fraction of the peak."""
        return self.model_flops / self.total_s / self.peak_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a step takes."""

    parameters: int
    """Of the whole model."""
    memory: MemoryEstimate
    """Of the heaviest rank."""
    stages: tuple[MemoryEstimate, ...]
    """Of the heaviest rank of each pipeline stage."""
    step: StepEstimate
