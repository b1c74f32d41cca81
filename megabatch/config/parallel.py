"""How one model is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megabatch.config.declare import param


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """How one model replica is split over ranks; data parallel size is world / (tp * pp * cp)."""

    tensor_model_parallel_size: int = param(1, at_least=1)
    """Ranks sharing each layer's matrices (tp). Heads and KV groups must divide by it; keep it inside a node."""
    sequence_parallel: bool = param(False)
    """Splits activations between the matrices along the sequence over the tp ranks; needs tp above 1."""
    context_parallel_size: int = param(1, built=False, at_least=1)
    """Ranks sharing each sequence (cp)."""
    expert_model_parallel_size: int = param(1, at_least=1)
    """Ranks over which a layer's experts are dealt (ep); must divide the number of experts."""
    expert_tensor_parallel_size: int = param(1, at_least=1)
    """Ranks sharing each expert's matrices (etp), independent of tp."""

    pipeline_model_parallel_size: int = param(1, at_least=1)
    """Stages that the layers are split into (pp), each on its own ranks."""
    decoder_first_pipeline_num_layers: int | None = param(None, at_least=1)
    """Layers of the first stage; the stages between first and last share the rest evenly."""
    decoder_last_pipeline_num_layers: int | None = param(None, at_least=1)
    """Layers of the last stage."""
    account_for_embedding_in_pipeline_split: bool = param(False)
    """Counts the embedding as a layer, so that the first stage gets one transformer layer less."""
    account_for_loss_in_pipeline_split: bool = param(False)
    """Counts the output layer with its loss as a layer, so that the last stage gets one transformer layer less."""
    num_layers_per_virtual_pipeline_stage: int | None = param(None, at_least=1)
    """Interleaves the pipeline in chunks of this many layers (vpp); or give the number of chunks instead."""
    num_virtual_stages_per_pipeline_rank: int | None = param(None, at_least=1)
    """Chunks that each stage holds (vpp): less idle time for more communication."""
    microbatch_group_size_per_virtual_pipeline_stage: int | None = param(None, at_least=1)
    """Micro-batches that go through one chunk before the next has its turn; None means pp, which is the least."""
    pipeline_model_parallel_layout: str | None = param(None)
    """The split spelled out: `E` embedding, `t` transformer layer, `m` MTP layer, `L` loss, `|` between stages.

    `*` repeats a letter or a group and commas mean nothing: `E|(t|)*3,m|m||L` has eight stages, for pp * vpp = 8.
    """

    use_distributed_optimizer: bool = param(True)
    """Splits optimizer state over data parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = param(False, speed_only=True)
    """Reduces gradients over data parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = param(False, speed_only=True)
    """Gathers updated parameters while the next forward pass already runs; needs `overlap_grad_reduce`."""
    tp_comm_overlap: bool = param(False, speed_only=True)
    """Overlaps tensor parallel communication with matrix products; refused while rows differ in length."""
    distributed_backend: Literal["nccl", "gloo"] = param("nccl")
    """How ranks communicate: nccl between GPUs, gloo between CPU processes."""
    distributed_timeout_minutes: int = param(300000, at_least=1)
    """How long a rank waits for the others in a collective, in minutes, before the run fails."""
