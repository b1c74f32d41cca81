"""How one model is split over ranks."""

from __future__ import annotations

from typing import Literal

from megabatch.config.declare import MOST_RANKS, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """How one model replica is split over ranks; data parallel size is world / (tp * pp * cp)."""

    tensor_model_parallel_size: int = param(1, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each layer's matrices (tp). It must divide heads and KV groups; keep it within a node."""
    sequence_parallel: bool = param(False)
    """Splits activations outside the matrix products along the sequence, over the tp ranks; needs tp above 1."""
    context_parallel_size: int = param(1, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each sequence (cp): each has 1/cp of its tokens, and so of their activations."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = param(
        None,
        built=(None, "p2p", "a2a"),
        refused="knows no packed rows in Transformer Engine (2.11), and the trainer's rows are packed",
    )
    """How Transformer Engine's attention brings keys and values to all cp ranks: around a ring (p2p, its default, not
    with sliding windows), gathered, or heads exchanged for tokens (a2a). Without Transformer Engine they are always
    gathered; leave it None."""
    expert_model_parallel_size: int = param(1, at_least=1, at_most=MOST_RANKS)
    """Ranks over which a layer's experts are distributed (ep); must divide the number of experts."""
    expert_tensor_parallel_size: int = param(1, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each expert's matrices (etp), independent of tp."""

    pipeline_model_parallel_size: int = param(1, at_least=1, at_most=MOST_RANKS)
    """Stages that the layers are split into (pp), each on its own ranks."""
    decoder_first_pipeline_num_layers: int | None = param(None, at_least=1)
    """Layers of the first stage; the stages between first and last share the rest evenly."""
    decoder_last_pipeline_num_layers: int | None = param(None, at_least=1)
    """Layers of the last stage."""
    account_for_embedding_in_pipeline_split: bool = param(False)
    """Counts the embedding as a layer: the first stage gets one transformer layer less."""
    account_for_loss_in_pipeline_split: bool = param(False)
    """Counts the output layer and its loss as a layer: the last stage gets one transformer layer less."""
    num_layers_per_virtual_pipeline_stage: int | None = param(None, at_least=1)
    """Interleaves the pipeline in chunks of this many layers (vpp); or set the number of chunks instead."""
    num_virtual_stages_per_pipeline_rank: int | None = param(
        None, aliases=("virtual_pipeline_model_parallel_size",), at_least=1
    )
    """Chunks per stage (vpp): less idle time, more communication."""
    microbatch_group_size_per_virtual_pipeline_stage: int | None = param(
        None, aliases=("microbatch_group_size_per_vp_stage",), at_least=1
    )
    """Micro-batches that go through one chunk before the next chunk runs; None means pp, the minimum."""
    pipeline_model_parallel_layout: str | None = param(None)
    """The split spelled out: `E` embedding, `t` transformer layer, `m` MTP layer, `L` loss, `|` between stages.

    `*` repeats a letter or a group; commas are ignored: `E|(t|)*3,m|m||L` has eight stages, for pp * vpp = 8.
    """

    use_distributed_optimizer: bool = param(True)
    """Splits optimizer state over data parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = param(False, speed_only=True)
    """Reduces gradients over data parallel ranks during the backward pass."""
    overlap_param_gather: bool = param(False, speed_only=True)
    """Gathers updated parameters during the next forward pass; needs `overlap_grad_reduce`."""
    tp_comm_overlap: bool = param(False, speed_only=True)
    """Overlaps tensor parallel communication with matrix products; refused if rows differ in length."""
    distributed_backend: Literal["nccl", "gloo"] = param("nccl", aliases=("ddp_backend",))
    """How ranks communicate: nccl between GPUs, gloo between CPU processes."""
    distributed_timeout_minutes: int = param(300000, at_least=1)
    """How long a rank waits for the others in a collective, in minutes, before the run fails."""
