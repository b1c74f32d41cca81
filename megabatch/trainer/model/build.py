"""This rank's part of a model: one megatron-core GPTModel for each pipeline chunk, wrapped for data parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megabatch.errors import ConfigError
from megabatch.plan.shape import ModelShape
from megabatch.trainer import megatron_moe
from megabatch.trainer.model.heads import HeadedModel
from megabatch.trainer.model.layers import decoder_layers
from megabatch.trainer.model.lora.layers import TRAINED, using
from megabatch.trainer.model.lora.lora import Lora
from megabatch.trainer.model.naming import unwrap
from megabatch.trainer.model.rope import Rotary, inverse_frequencies
from megabatch.trainer.model.tuning import ALL, Tuning
from megabatch.trainer.offload import Offload
from megabatch.trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Model:
    """The chunks on this rank and what they were built from."""

    wrapped: list[Any]
    """One per virtual pipeline stage, in megatron-core's wrappers, for its schedules and its optimizer. With
    `overlap_param_gather` their parameters may predate the last step: use `chunks` to read or write parameters."""
    config: TransformerConfig
    shape: ModelShape
    padded_vocab_size: int
    ranks: Ranks
    """The layout that it is split by."""
    rotary: Rotary | None
    """For the rows of our own attention (`row.row`); None with Transformer Engine, whose layers rotate themselves."""
    tuning: Tuning = ALL
    """Which parts of the model are trained."""
    others: dict[str, Lora] = field(default_factory=dict)
    """Frozen adapters beside the trained one, by name (`references.add_adapter`)."""
    offload: Offload | None = None
    """Of all weights, for a model that is in host memory while it is not in use."""

    def on_device(self) -> AbstractContextManager[None]:
        """Inside this context the weights are on the device."""
        return nullcontext() if self.offload is None else self.offload.on_device()

    @property
    def chunks(self) -> list[Any]:
        """The bare models, one per virtual pipeline stage, with the parameters of the last step.

        With `overlap_param_gather` it is collective over data-parallel ranks: an optimizer step then updates only this
        rank's part of each parameter and leaves the gather to the next forward pass. This gathers what is missing.
        """
        for chunk in self.wrapped:
            _gather_parameters(chunk)
        return [unwrap(chunk) for chunk in self.wrapped]

    @contextmanager
    def with_adapter(self, name: str | None) -> Iterator[None]:
        """Inside this context the model uses this adapter; None gives the model before LoRA, for example a reference.

        Raises: ConfigError for a name that no adapter has, and for any but the trained one if the run also trains the
        model's own parameters: their old values are gone.
        """
        if name is not None and name != TRAINED and name not in self.others:
            known = ", ".join([*([TRAINED] if self.tuning.lora else ()), *self.others]) or "none"
            raise ConfigError(f"the model has no adapter {name!r}; it has {known}")
        if name != TRAINED and self.tuning.trained:
            raise ConfigError(
                "tuner.modules_to_save and lora_bias='all' train the model's own parameters, so that the model "
                "without the adapter is gone; leave them out, or name a reference of its own"
            )
        with using(self.chunks, name):
            yield


class HalfPrecision(Float16Module):
    """A chunk in bfloat16 or fp16 that does not convert its logits: the loss converts a few rows at a time to fp32.

    megatron-core would return fp32 copies: for 8,192 tokens by 152,000 entries, logits and gradients would take 15 GB
    instead of 5. The numbers are the same.
    """

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **kwargs)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """The vocabulary size, padded so that every tensor-parallel rank has the same number of rows."""
    return -(-vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


def build(
    shape: ModelShape,
    config: TransformerConfig,
    ranks: Ranks,
    ddp: DistributedDataParallelConfig | None,
    *,
    vocab_size: int | None = None,
    tuning: Tuning = ALL,
) -> Model:
    """Builds this rank's chunks. Allocates weights but does not initialise them: the caller loads them next.

    Call it inside `ranks.in_use`.

    Args: ddp: None for a model without gradients; vocab_size: rows of the embedding with padding, None pads as little
    as tensor parallelism needs; tuning: which parts of the model are trained.
    """
    vocab = vocab_size or padded_vocab_size(shape.vocab_size, ranks.tp_size)
    stages = range(ranks.virtual_size) if ranks.virtual_size else [None]
    chunks: list[Any] = [_chunk(shape, config, vp_stage=stage, vocab=vocab) for stage in stages]
    for chunk in chunks:
        tuning.apply(chunk, config, ranks, padded_vocab=vocab)
        chunk.to(ranks.device)
    if config.bf16 or config.fp16:
        chunks = [HalfPrecision(config, chunk) for chunk in chunks]
    if ddp is None:
        wrapped = [chunk.requires_grad_(False) for chunk in chunks]
    else:
        wrapped = [DistributedDataParallel(config, ddp, one, disable_bucketing=i > 0) for i, one in enumerate(chunks)]
    ours = config.transformer_impl != "transformer_engine"
    rotary = Rotary(shape, device=ranks.device, dtype=config.params_dtype) if ours else None
    return Model(wrapped, config, shape, vocab, ranks, rotary, tuning)


def _gather_parameters(chunk: Any) -> None:
    """Gathers the buckets that no forward pass has gathered yet, and waits for pending gathers.

    megatron-core's own `start_param_sync(force_sync=True)` would gather all buckets again on every call.
    """
    if not isinstance(chunk, DistributedDataParallel):
        return
    if not (chunk.ddp_config.use_distributed_optimizer and chunk.ddp_config.overlap_param_gather):
        return
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if group.param_gather_handle is not None or not group.param_gather_dispatched:
            group.start_param_sync(force_sync=True)


def _chunk(shape: ModelShape, config: TransformerConfig, *, vp_stage: int | None, vocab: int) -> GPTModel:
    from megatron.core import parallel_state

    ignore_virtual, te = vp_stage is None, config.transformer_impl == "transformer_engine"
    model = (GPTModel if shape.num_labels is None else HeadedModel)(
        config=config,
        transformer_layer_spec=decoder_layers(config, shape, vp_stage=vp_stage),
        vocab_size=vocab,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.ties_output_layer,
        # megatron-core's own is recomputed in every layer, and reads the sequences' lengths back from the device
        position_embedding_type="rope" if te else "none",
        rotary_base=int(shape.rotary_base),
        vp_stage=vp_stage,
    )
    if isinstance(model, HeadedModel):
        model.set_head(shape.num_labels or 0, bias=shape.head_bias)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            # megatron-core sets this mark only with ep > 1. With ep = 1 and tp > 1 it would not sum the gradients of
            # tensor-parallel ranks, although each of them sends its own tokens to its own copy of the experts.
            parameter.allreduce = False
    megatron_moe.prepare(model)
    if te:
        model.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(model.rotary_pos_emb.inv_freq.device)
    return model


def ddp_config(
    *, use_distributed_optimizer: bool, overlap_grad_reduce: bool, overlap_param_gather: bool, fp32_grads: bool = True
) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=fp32_grads,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        average_in_collective=False,
        check_for_nan_in_grad=False,
    )
