"""`megatron_extra_kwargs` is for what megabatch does not set itself: the rest is refused, with who sets it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from megabatch.config.declare import parameters
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_FIELD = "training.megatron_extra_kwargs"
_TORCH_DTYPE = "model.torch_dtype"
_UNDER_OTHER_NAMES = {
    "apply_rope_fusion": "kernels.no_rope_fusion",
    "bias_activation_fusion": "kernels.no_bias_swiglu_fusion",
    "bias_dropout_fusion": "kernels.no_bias_dropout_fusion",
    "fp8": "fp8.fp8_format",
    "gradient_accumulation_fusion": "kernels.no_gradient_accumulation_fusion",
    "layernorm_epsilon": "model.norm_epsilon",
    "masked_softmax_fusion": "kernels.no_masked_softmax_fusion",
    "microbatch_group_size_per_vp_stage": "parallel.microbatch_group_size_per_virtual_pipeline_stage",
    "num_layers_in_first_pipeline_stage": "parallel.decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "parallel.decoder_last_pipeline_num_layers",
    "num_moe_experts": "moe.num_experts",
    "params_dtype": _TORCH_DTYPE,
    "pipeline_dtype": _TORCH_DTYPE,
    "virtual_pipeline_model_parallel_size": "parallel.num_virtual_stages_per_pipeline_rank",
}
"""Field of megatron-core's TransformerConfig → the parameter that sets it."""
_OF_THE_MODEL = frozenset({
    "activation_func", "add_bias_linear", "apply_residual_connection_post_layernorm", "attention_output_gate",
    "experimental_attention_variant", "gated_linear_unit", "heterogeneous_block_specs",
    "layernorm_zero_centered_gamma", "moe_latent_size", "moe_shared_expert_gate", "rotary_interleaved",
    "softmax_scale",
})  # fmt: skip
"""What the model's family settles: another value would train, and export, another model than its files say."""
_OF_THE_TRAINER = frozenset({
    "batch_p2p_comm", "deallocate_pipeline_outputs", "finalize_model_grads_func", "grad_scale_func", "grad_sync_func",
    "init_method", "no_sync_func", "output_layer_init_method", "overlap_p2p_comm", "param_sync_func",
    "perform_initialization", "variable_seq_lengths",
})  # fmt: skip
"""What the trainer needs as it is, for rows of various lengths, its losses or its overlaps."""

_GRAPHS = (
    "replays layers from a CUDA graph, which megatron-core (0.16) does without the sequences' bounds in a packed row "
    "and without the padding that experts leave out (docs/gpu.md)"
)
_PARTS = (
    "runs layers in parts (schedule plans), in which megatron-core (0.16) gives routers no padding mask: experts "
    "would get padding (docs/gpu.md)"
)
_HYBRIDEP = "belongs to moe_flex_dispatcher_backend=hybridep, which is refused"
_REFUSED = {
    "cuda_graph_impl": _GRAPHS,
    "cuda_graph_scope": _GRAPHS,
    "enable_cuda_graph": _GRAPHS,
    "external_cuda_graph": _GRAPHS,
    "delay_wgrad_compute": _PARTS,
    "overlap_moe_expert_parallel_comm": _PARTS,
    "moe_hybridep_num_sms": _HYBRIDEP,
}
"""Fields that the trainer cannot honour, and why not."""


def extra_fields_are_not_set_elsewhere(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    for name in recipe.training.megatron_extra_kwargs or {}:
        if owner := owner_of(name):
            yield Fault(_FIELD, None, f"names {name}, which {owner}", bare=True)


def owner_of(name: str) -> str | None:
    """Who sets a field of TransformerConfig, or why nobody may, as the end of a sentence; None for what megabatch
    leaves alone."""
    if parameter := _parameters().get(name) or _UNDER_OTHER_NAMES.get(name):
        return f"{parameter} sets; give it there"
    if name in _OF_THE_MODEL:
        return "the model's family determines; leave it out"
    if name in _OF_THE_TRAINER:
        return "the trainer sets; leave it out"
    return f"{_REFUSED[name]}; leave it out" if name in _REFUSED else None


@functools.cache
def _parameters() -> dict[str, str]:
    return {found.name: found.dotted for found in reversed(parameters(Recipe))}


RULES = (extra_fields_are_not_set_elsewhere,)
