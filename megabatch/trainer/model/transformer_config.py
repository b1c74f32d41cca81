"""A model's shape and a run's settings → megatron-core's TransformerConfig."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.config.shared_prompts import why_local_layers
from megabatch.config.tuner import Tuner
from megabatch.converters.families import family_named
from megabatch.converters.frozen import Freezing, trains_biases_alone
from megabatch.errors import ConfigError, ConversionError
from megabatch.plan.shape import ModelShape
from megabatch.trainable import untrainable

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def transformer_config(recipe: Recipe, shape: ModelShape, *, virtual_size: int | None) -> TransformerConfig:
    """The configuration for a resolved recipe; `virtual_size` is the number of chunks per pipeline stage.

    Raises: ConfigError for a model that the trainer does not support, and for a combination that megatron-core
    refuses, with megatron-core's message.
    """
    if reason := untrainable(shape):
        raise ConfigError(f"{shape.architecture or shape.model_type} cannot be trained: {reason}")
    values = own_values(recipe, shape, virtual_size=virtual_size)
    try:
        config = TransformerConfig(**values, **_extra(recipe.training.megatron_extra_kwargs))
    except (ValueError, AssertionError) as e:
        raise ConfigError(f"megatron-core refuses this model and layout: {e}") from e
    # Set after construction, since megatron-core (0.16-0.19) refuses it for dispatchers that exchange whole rows.
    # `Share.equal_rows` gives such rows equal lengths, but pipeline stages still see rows of various lengths, unless
    # the run pads every row.
    config.variable_seq_lengths = (
        recipe.parallel.pipeline_model_parallel_size > 1 and not recipe.data.pad_to_max_length
    )
    if _takes_own_activation(config):
        config.use_te_activation_func = True  # megatron-core's name for one that a layer's spec brings: see `layers`
    return config


def _takes_own_activation(config: TransformerConfig) -> bool:
    """Whether dense layers are plain SwiGLU on CPUs, of a model without experts, whose activation stays as it is."""
    plain = config.activation_func_clamp_value is None and config.glu_linear_offset == 0
    return plain and config.num_moe_experts is None and not torch.cuda.is_available()


def own_values(recipe: Recipe, shape: ModelShape, *, virtual_size: int | None) -> dict[str, Any]:
    """Every field that megabatch sets itself; `megatron_extra_kwargs` may name none of them."""
    impl = transformer_impl(recipe, shape)
    return {
        **_model(shape, recipe),
        **_moe(shape, recipe, has_te=impl == "transformer_engine"),
        **_parallel(
            recipe, virtual_size, has_te=impl == "transformer_engine", has_windows=shape.sliding_window is not None
        ),
        **_recompute(recipe),
        **_kernels(recipe, has_te=impl == "transformer_engine"),
        "transformer_impl": impl,
    }


def _model(shape: ModelShape, recipe: Recipe) -> dict[str, Any]:
    dtype = DTYPES[resolved(recipe.model.torch_dtype)]
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "attention_dropout": recipe.model.attention_dropout,
        "hidden_dropout": recipe.model.hidden_dropout,
        **_windows(shape),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "init_method": leave_uninitialised,
        "output_layer_init_method": leave_uninitialised,
        "moe_token_dispatcher_type": "alltoall",
    }


def _windows(shape: ModelShape) -> dict[str, Any]:
    """megatron-core counts only the tokens before a query's own; `sliding_window` includes it."""
    if shape.sliding_window is None:
        return {}
    layers = [int(windowed) for windowed in shape.window_layers] or None
    return {"window_size": (shape.sliding_window - 1, 0), "window_attn_skip_freq": layers}


def leave_uninitialised(weight: torch.Tensor) -> None:
    """Does nothing, since weights are loaded after building. `perform_initialization=False` would also skip marking
    the tensor-parallel parameters, and gradient norms would then miss the shards of every rank but the first."""


def transformer_impl(recipe: Recipe, shape: ModelShape) -> str:
    """`local` where Transformer Engine cannot be used; logs the reason once unless it was asked for."""
    if (why := why_local_here(recipe, shape)) is None:
        return "transformer_engine"
    if recipe.kernels.transformer_impl != "local":
        _say_local(why)
    return "local"


def why_local_here(recipe: Recipe, shape: ModelShape) -> str | None:
    """Why a run has megatron-core's local layers; None where it has Transformer Engine's."""
    if (why := why_local_layers(recipe, shape)) is not None:
        return why
    if trains_biases_alone_of(recipe.tuner, shape):
        return "biases beside frozen weights have their gradients there alone"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def trains_biases_alone_of(tuner: Tuner, shape: ModelShape) -> bool:
    """Whether training in part trains a bias beside a frozen weight, to which Transformer Engine (2.11) gives no
    gradient. Raises: ConfigError for names of tensors that match nothing."""
    if not tuner.trains_part:
        return False
    try:
        return trains_biases_alone(family_named(shape.model_type).tensors(shape), Freezing.of(tuner))
    except ConversionError as e:
        raise ConfigError(f"tuner.{e}") from e


@functools.cache
def _say_local(why: str) -> None:
    logger.info("kernels.transformer_impl: megatron-core's local layers with torch attention, because %s", why)


DEEPEP_CAPABILITY = (8, 0)
"""The oldest GPUs that DeepEP has kernels for (its README, 2025): A100 within a node, H100 between nodes too."""


def require_deep_ep() -> None:
    """Raises: ConfigError where the package or the GPU cannot be used."""
    field = "moe.moe_token_dispatcher_type=flex"
    if importlib.util.find_spec("deep_ep") is None:
        raise ConfigError(
            f"{field} needs the package deep_ep, which is not installed on this node (github.com/deepseek-ai/DeepEP "
            "says how); or use alltoall"
        )
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < DEEPEP_CAPABILITY:
        least = _dotted(DEEPEP_CAPABILITY)
        raise ConfigError(f"{field} needs GPUs of compute capability {least} or newer; this one has {_dotted(found)}")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _moe(shape: ModelShape, recipe: Recipe, *, has_te: bool) -> dict[str, Any]:
    if shape.num_experts is None:
        return {}
    moe = recipe.moe
    if moe.moe_token_dispatcher_type == "flex":
        require_deep_ep()
    return {
        "num_moe_experts": shape.num_experts,
        "moe_layer_freq": 1 if all(shape.moe_layers) else [int(x) for x in shape.moe_layers],
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_pre_softmax": shape.moe_router_pre_softmax,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "moe_router_dtype": None if moe.moe_router_dtype == "none" else moe.moe_router_dtype,
        "moe_router_score_function": resolved(moe.moe_router_score_function),
        "moe_router_load_balancing_type": resolved(moe.moe_router_load_balancing_type),
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        "moe_flex_dispatcher_backend": moe.moe_flex_dispatcher_backend,
        "moe_deepep_num_sms": moe.moe_deepep_num_sms,
        "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": moe.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": moe.moe_token_drop_policy,
        **_fused_experts(recipe, has_te=has_te),
    }


def _fused_experts(recipe: Recipe, *, has_te: bool) -> dict[str, Any]:
    """Transformer Engine's kernels for experts; without it, each expert runs on its own, with the same result."""
    return {
        "moe_grouped_gemm": has_te and recipe.moe.moe_grouped_gemm,
        "moe_permute_fusion": has_te and recipe.moe.moe_permute_fusion,
        "moe_shared_expert_overlap": has_te and recipe.moe.moe_shared_expert_overlap,
    }


def _parallel(recipe: Recipe, virtual_size: int | None, *, has_te: bool, has_windows: bool) -> dict[str, Any]:
    parallel = recipe.parallel
    if parallel.cp_comm_type is not None and not has_te:
        raise ConfigError(
            f"parallel.cp_comm_type={parallel.cp_comm_type} is Transformer Engine's, which this run does not use; "
            "leave it None: keys and values are gathered"
        )
    is_ring = has_te and parallel.context_parallel_size > 1 and parallel.cp_comm_type in (None, "p2p")
    if is_ring and has_windows:
        raise ConfigError(
            f"parallel.cp_comm_type={parallel.cp_comm_type} sends keys and values around a ring, for which "
            "Transformer Engine (2.11) has no sliding windows; try a2a, or kernels.transformer_impl=local"
        )
    pipelined = parallel.pipeline_model_parallel_size > 1
    values: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.cp_comm_type,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # a sent output is needed only for its graph; but the interleaved schedule would free outputs still being sent
        "deallocate_pipeline_outputs": pipelined and virtual_size is None,
        "batch_p2p_comm": virtual_size is None,  # batched sends mix up the two neighbours if they are the same rank
        "overlap_p2p_comm": pipelined and virtual_size is not None,
    }
    if pipelined:
        values |= {
            "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
            "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
            "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
            "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
            "virtual_pipeline_model_parallel_size": virtual_size,
            "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout,
            "microbatch_group_size_per_vp_stage": resolved(parallel.microbatch_group_size_per_virtual_pipeline_stage),
        }
    return values


def _recompute(recipe: Recipe) -> dict[str, Any]:
    recompute = recipe.recompute
    if recompute.recompute_granularity == "none":
        return {}
    values: dict[str, Any] = {"recompute_granularity": recompute.recompute_granularity}
    if recompute.recompute_granularity == "full":
        values["recompute_method"] = recompute.recompute_method
        values["recompute_num_layers"] = recompute.recompute_num_layers
    else:
        values["recompute_modules"] = list(recompute.recompute_modules)
    return values


def _kernels(recipe: Recipe, *, has_te: bool) -> dict[str, Any]:
    """Fused kernels need CUDA; on CPUs they would compute the same numbers more slowly."""
    kernels, cuda = recipe.kernels, torch.cuda.is_available()
    has_wgrad = cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None  # a part of Apex
    return {
        "masked_softmax_fusion": cuda and not kernels.no_masked_softmax_fusion,
        "bias_dropout_fusion": cuda and not kernels.no_bias_dropout_fusion,
        "bias_activation_fusion": cuda and not kernels.no_bias_swiglu_fusion,
        "apply_rope_fusion": has_te and not kernels.no_rope_fusion,
        "gradient_accumulation_fusion": has_wgrad and not kernels.no_gradient_accumulation_fusion,
        "attention_backend": _attention_backend(kernels.attention_backend, has_te=has_te),
        "apply_query_key_layer_scaling": has_te and bool(recipe.precision.apply_query_key_layer_scaling),
        "deterministic_mode": recipe.training.deterministic_mode,
    }


def _attention_backend(wanted: str, *, has_te: bool) -> AttnBackend:
    """Transformer Engine's `flash` is the package flash-attn; without it cuDNN's fused attention computes the same."""
    if has_te and wanted == "flash" and not any(importlib.util.find_spec(name) for name in _FLASH):
        _say_fused()
        return AttnBackend.fused
    return AttnBackend[wanted]


_FLASH = ("flash_attn", "flash_attn_interface", "flash_attn_3")


@functools.cache
def _say_fused() -> None:
    logger.info("kernels.attention_backend: fused, from cuDNN, because flash-attn is not installed")


def _extra(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """`megatron_extra_kwargs`, which may name only fields of TransformerConfig."""
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    unknown = sorted(set(values or {}) - known)
    if unknown:
        raise ConfigError(
            f"training.megatron_extra_kwargs: {', '.join(unknown)} is no field of this megatron-core's "
            f"TransformerConfig{_nearest(unknown[0], known)}"
        )
    return dict(values or {})


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; try {near[0]}" if near else ""
