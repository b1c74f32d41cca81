"""A model with multi-latent attention straight from megatron-core: the trainer has not built one yet.

megatron-core's local layers cut the projections to the latents by tensor parallelism, Transformer Engine's keep them
whole on each rank. The latter is what checkpoints and estimates are about, and is put in the former's place here.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import nn
from torch.nn.functional import silu

from megabatch.config.run import RunConfig
from megabatch.plan.shape import ModelShape
from megabatch.trainer.model.attention import PackedAttention
from megabatch.trainer.model.build import Model, ddp_config
from megabatch.trainer.model.norms import RMSNorm
from megabatch.trainer.model.transformer_config import leave_uninitialised
from megabatch.trainer.ranks import Ranks


class Duplicated(nn.Module):
    """A matrix that every tensor parallel rank has whole."""

    def __init__(self, inputs: int, outputs: int, *, config: MLATransformerConfig, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))


def latent_model(run: RunConfig, ranks: Ranks) -> Model:
    """One chunk, as `trainer.model.build` would make it."""
    multi_latent_attention.TELinear = Duplicated
    shape, parallel = run.shape, run.recipe.parallel
    config = _config(shape, run)
    layers = [_layer(moe=moe) for moe in shape.moe_layers]
    model = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
        vocab_size=shape.vocab_size,
        max_sequence_length=128,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
    ddp = ddp_config(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    wrapped = [DistributedDataParallel(config, ddp, Float16Module(config, model))]
    return Model(wrapped, config, shape, shape.vocab_size, ranks, rotary=None)


def _config(shape: ModelShape, run: RunConfig) -> MLATransformerConfig:
    return MLATransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        q_lora_rank=shape.q_lora_rank,
        kv_lora_rank=shape.kv_lora_rank,
        qk_head_dim=shape.qk_head_dim,
        qk_pos_emb_head_dim=shape.qk_pos_emb_head_dim,
        v_head_dim=shape.v_head_dim,
        num_moe_experts=shape.num_experts,
        moe_layer_freq=[int(moe) for moe in shape.moe_layers],
        moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
        moe_router_topk=shape.moe_router_topk,
        moe_shared_expert_intermediate_size=shape.moe_shared_expert_intermediate_size,
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        tensor_model_parallel_size=run.layout.tp,
        expert_model_parallel_size=run.layout.ep,
        expert_tensor_parallel_size=run.layout.etp,
        sequence_parallel=run.recipe.parallel.sequence_parallel,
        attention_backend=AttnBackend.flash,  # the trainer's: megatron-core keeps the first in the environment
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _layer(*, moe: bool) -> Any:
    spec = get_gpt_layer_local_spec(
        num_experts=2 if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=True,
        multi_latent_attention=True,
        normalization="RMSNorm",
    )
    attention: Any = spec.submodules.self_attention.submodules
    attention.linear_q_down_proj = attention.linear_kv_down_proj = Duplicated
    attention.core_attention = PackedAttention
    attention.q_layernorm = attention.kv_layernorm = RMSNorm
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec
