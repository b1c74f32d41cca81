"""This rank's part of a model: one megatron-core GPTModel for each pipeline chunk, wrapped for data parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megabatch.errors import ConfigError
from megabatch.plan.shape import ModelShape
from megabatch.trainer import megatron_moe
from megabatch.trainer.model.layers import decoder_layers
from megabatch.trainer.model.lora.layers import using
from megabatch.trainer.model.naming import unwrap
from megabatch.trainer.model.rope import Rotary, inverse_frequencies
from megabatch.trainer.model.tuning import ALL, Tuning
from megabatch.trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Model:
    """The chunks on this rank and what they were built from."""

    wrapped: list[Any]
    """One for each virtual pipeline stage, in megatron-core's wrappers: for its schedules and its optimizer, which may
    leave parameters as they were before the last step. Whatever reads or writes parameters takes `chunks`."""
    config: TransformerConfig
    shape: ModelShape
    padded_vocab_size: int
    rotary: Rotary | None
    """For rows of our own attention (`row.row`); None where Transformer Engine's layers rotate by themselves."""
    tuning: Tuning = ALL
    """What of it is trained."""

    @property
    def chunks(self) -> list[Any]:
        """The bare models, one for each virtual pipeline stage, whose parameters are those of the last step.

        Collective over data-parallel ranks with `overlap_param_gather`: an optimizer step then updates this rank's
        part of each parameter alone and leaves the rest to the next forward. What is still missing is gathered here.
        """
        for chunk in self.wrapped:
            _gather_parameters(chunk)
        return [unwrap(chunk) for chunk in self.wrapped]

    @contextmanager
    def with_adapter(self, name: str | None) -> Iterator[None]:
        """Within it the model has this adapter; None is the model as it was before LoRA, such as a reference.

        Raises: ConfigError where parameters of the model itself are trained too, of which nothing is kept.
        """
        if name is None and self.tuning.trained:
            raise ConfigError(
                "tuner.modules_to_save and lora_bias='all' train the model's own parameters, so that the model "
                "without the adapter is gone; leave them out, or name a reference of its own"
            )
        with using(self.chunks, name):
            yield


class HalfPrecision(Float16Module):
    """A chunk in bfloat16 or fp16 whose logits stay so: the loss turns them into fp32 a few rows at a time.

    megatron-core would hand out fp32 copies: of 8,192 tokens by 152,000 entries, logits and gradients take 15 GB
    rather than 5. The numbers are the same.
    """

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **kwargs)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """The vocabulary filled up so that every tensor-parallel rank has equally many rows."""
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
    """Weights are allocated and not initialised: they are loaded next, from whatever source.

    Args: ddp: None for a model without gradients; vocab_size: rows of the embedding with padding, None pads as little
    as tensor parallelism needs; tuning: what of the model is trained.
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
    return Model(wrapped, config, shape, vocab, rotary, tuning)


def _gather_parameters(chunk: Any) -> None:
    """Gathers the buckets that no forward has gathered yet, and waits for those on their way.

    megatron-core's own `start_param_sync(force_sync=True)` would gather all of them again at every call.
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
    model = GPTModel(
        config=config,
        transformer_layer_spec=decoder_layers(config, shape, vp_stage=vp_stage),
        vocab_size=vocab,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
        # megatron-core's own is computed anew in every layer, and reads the sequences' lengths back from the device
        position_embedding_type="rope" if te else "none",
        rotary_base=int(shape.rotary_base),
        vp_stage=vp_stage,
    )
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            # megatron-core marks experts so only with ep > 1; with tp > 1 = ep it would not add up the gradients of
            # tensor-parallel ranks, each of which sends its own tokens to its own copy of the experts.
            parameter.allreduce = False
    megatron_moe.prepare(model)
    if te:
        model.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(model.rotary_pos_emb.inv_freq.device)
    return model


def ddp_config(
    *, use_distributed_optimizer: bool, overlap_grad_reduce: bool, overlap_param_gather: bool
) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        average_in_collective=False,
        check_for_nan_in_grad=False,
    )
