"""Training straight on megatron-core: what the trainer's step is compared with.

Its own GPTModel, local layers, schedule, data parallelism, optimizer and vocabulary-parallel cross entropy; one
[rows, length] batch in memory, nothing logged. On a machine without CUDA it stands on the same adaptations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megabatch.plan.shape import ModelShape

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""[rows, length] each: token ids, positions, targets, loss weights."""


class BatchedAttention(torch.nn.Module):
    """Causal attention of equally long rows by torch's fused kernel: the fastest that needs no other package."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBGD, value_SBGD))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).reshape(*query_SBHD.shape[:2], -1)


class BareLoop:
    """A model with the given weights and an Adam with the given learning rate, on one rank."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        weights: Mapping[str, Tensor],
        *,
        vocab_size: int,
        fused_attention: bool,
        device: torch.device,
        lr: float,
    ) -> None:
        spec: Any = get_gpt_layer_local_spec(
            shape.num_experts, qk_layernorm=shape.qk_layernorm, normalization="RMSNorm"
        )
        if fused_attention:
            spec.submodules.self_attention.submodules.core_attention = BatchedAttention
        model: Any = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=int(shape.rotary_base),
        ).to(device)
        # where Transformer Engine is installed, the last norm is its own, with a state that holds nothing in bf16
        absent = [name for name in model.state_dict() if name not in weights and name.endswith("_extra_state")]
        model.load_state_dict({**weights, **dict.fromkeys(absent)})
        if config.bf16:
            model = Float16Module(config, model)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(config, ddp, model)
        self.optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=lr,
                min_lr=lr,
                adam_beta2=0.95,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )
        self.scheduler = _constant(self.optimizer, lr)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = get_forward_backward_func()

    def free(self) -> None:
        """Gives its memory back; a graph of torch's keeps the model itself alive."""
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        held = [one.optimizer for one in chained]
        kept = [tensor for one in held for state in one.state.values() for tensor in state.values()]
        kept += [tensor for one in held for group in one.param_groups for tensor in group["params"]]
        for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers):
            kept += [buffer.param_data, buffer.grad_data]
        for tensor in kept:
            if isinstance(tensor, Tensor):
                tensor.untyped_storage().resize_(0)

    def step(self, batches: Sequence[Rows]) -> tuple[float, float]:
        """Loss and gradient norm of one optimizer step over these micro-batches."""
        rows, length = batches[0][0].shape
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.schedule(
            forward_step_func=self._forward,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return float(torch.stack(losses).mean()), float(grad_norm)

    def _forward(self, batches: Iterator[Rows], model: Any) -> tuple[Tensor, Any]:
        ids, positions, targets, weights = next(batches)
        losses = model(input_ids=ids, position_ids=positions, attention_mask=None, labels=targets)
        return losses, lambda out: _mean(out, weights)


def _mean(losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    loss = (losses.float() * weights).sum() / weights.sum()
    return loss, loss.detach().clone()  # the schedule scales the loss in place


def _constant(optimizer: Any, lr: float) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=lr,
        max_lr=lr,
        min_lr=lr,
        lr_warmup_steps=0,
        lr_decay_steps=1_000_000,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
