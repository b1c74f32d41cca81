"""Settings of a run that estimates need besides the model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megabatch.plan.layout import Layout
from megabatch.plan.stages import Chunk
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Adapters beside frozen weights (arXiv:2106.09685)."""

    rank: int
    targets: Sequence[str]
    """Ends of megatron-core's names of layers that get adapters; `all-linear`, `all-router` and `all-embedding` stand
    for all of their kind."""
    fused: bool = False
    """Whether the layers of Hugging Face's in one of megatron-core's share an A."""
    dropout: float = 0.0
    """Probability of dropping an element of an adapter's input."""
    saved: Sequence[str] = ()
    """Ends of the names of modules that are trained in full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Muon:
    """How hidden matrices are updated."""

    state_bytes: int
    """Bytes of an element's main copy and mean."""
    steps: int
    """Of Newton-Schulz."""
    tp_mode: Literal["blockwise", "duplicated", "distributed"]
    peak: float
    """Peak of these steps' matrix products, in parts of the bf16 peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A run's layout, batch, precision and recomputation, in megatron-core's names where it has them."""

    layout: Layout
    chunks: Sequence[Chunk]
    """Which layers each pipeline rank's chunks hold."""
    mtp_layers: int = 0
    """Layers of multi-token prediction that are trained."""
    gpus_per_node: int = 8
    micro_batch_size: int = 1
    infer_batch_size: int = 0
    """Samples in a micro-batch of passes without gradients, where there are such passes."""
    row_tokens: int
    """Tokens of a row: the packing length, or the length of a sample."""
    mean_length: float
    """Token-weighted mean length of the sequences in a row, which attend only to themselves."""
    vocab_size: int
    """Rows of the embedding with padding."""
    microbatch_group_size: int = 0
    """Micro-batches that go through one chunk before the next chunk runs; 0 means pp."""

    sequence_parallel: bool = False
    recompute_granularity: str = "selective"
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: Sequence[str] = ("core_attn",)
    attention_scores: bool = False
    """Whether the attention kernel writes all scores to memory (unfused), which flash attention never does."""

    transformer_engine: bool = True
    """Whether layers are Transformer Engine's, which keep less; else megatron-core's local ones."""
    weight_bytes: int = 2
    """Bytes of a parameter, an activation's gradient, and an activation."""
    gradient_bytes: int = 4
    """Bytes of an accumulated gradient."""
    optimizer_bytes: int = 12
    """Bytes of a parameter's main copy and its moments."""
    optimizer_offload_fraction: float = 0.0
    """How much of that is in host memory, and updated there."""
    muon: Muon | None = None
    """What updates hidden matrices, if that is not what updates the rest."""
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = False
    moe_permute_fusion: bool = False
    frozen_copies: int = 0
    """Further models of the same shape and layout, without gradients: a reference of its own."""
    beside_bytes: int = 0
    """Weights of other further models on the rank that has most of them: a teacher, or a reference split otherwise."""
    lora: Lora | None = None
    frozen: frozenset[str] = frozenset()
    """Parameters that are not trained, by their names in the model with the layer inside."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch on one context parallel rank."""
        return self.micro_batch_size * self.row_tokens // self.layout.cp

    @property
    def sp(self) -> int:
        """Into how many parts sequence parallelism cuts the activations between the matrices."""
        return self.layout.tp if self.sequence_parallel else 1
