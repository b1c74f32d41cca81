"""Transformer layers: megatron-core's own, with our attention and norms where Transformer Engine is not used."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megabatch.plan.shape import ModelShape
from megabatch.trainer.model.activation import swiglu
from megabatch.trainer.model.attention import PackedAttention
from megabatch.trainer.model.norms import LayerNorm, RMSNorm


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A layer with a bias: megatron-core gives a bias to all linear layers or to none, but some models have few."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class BiasedRowParallelLinear(RowParallelLinear):
    """The same for layers whose input is split."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


def decoder_layers(
    config: TransformerConfig, shape: ModelShape, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage builds: dense or mixture of experts, by `moe_layer_freq`."""
    if config.transformer_impl == "transformer_engine":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    biases = {"output_bias": shape.attention_output_bias, "mlp_bias": shape.mlp_bias}
    dense, moe = (_local_layer(config, norm=norm, moe=is_moe, **biases) for is_moe in (False, True))
    layers = [moe if is_moe else dense for is_moe in _moe_pattern(config)]
    return TransformerBlockSubmodules(
        layer_specs=[layers[i] for i in local_layer_ids(config, vp_stage=vp_stage)], layer_norm=norm
    )


def local_layer_ids(config: TransformerConfig, *, vp_stage: int | None) -> list[int]:
    """Global indices, from 0, of the layers on this pipeline stage."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        from megatron.core.transformer.enums import LayerType

        return list(layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage))
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage)))


def _moe_pattern(config: TransformerConfig) -> list[bool]:
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [i % frequency == 0 for i in range(config.num_layers)]
    return [bool(x) for x in frequency]


def _local_layer(config: TransformerConfig, *, norm: type, moe: bool, output_bias: bool, mlp_bias: bool) -> ModuleSpec:
    """megatron-core's local layer with our norms and attention, saved under Transformer Engine's names.

    megatron-core's local spec maps `pre_mlp_layernorm` into `mlp.linear_fc1` for every layer, Transformer Engine only
    for dense layers. A checkpoint must not depend on which of them wrote it.
    """
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if output_bias:
        attention.linear_proj = BiasedRowParallelLinear
    if not moe:
        mlp: Any = layer.mlp.keywords["submodules"] if isinstance(layer.mlp, partial) else layer.mlp.submodules
        if mlp_bias:
            mlp.linear_fc1, mlp.linear_fc2 = BiasedColumnParallelLinear, BiasedRowParallelLinear
        if config.use_te_activation_func:
            mlp.activation_func = swiglu
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if moe:
        layer.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return spec
