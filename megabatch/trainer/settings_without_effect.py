"""Settings that have no effect in this run, or on this machine: said once, by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from megabatch.config.declare import Parameter, parameters
from megabatch.config.recipe import Recipe
from megabatch.config.shared_prompts import compares_answers, infers_alone, why_not
from megabatch.config.torch_dtype import torch_dtype
from megabatch.plan.shape import ModelShape
from megabatch.trainer.model.transformer_config import why_local_here

logger = logging.getLogger(__name__)

TRANSFORMER_ENGINE = (
    "attention_backend",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_shared_expert_overlap",
    "apply_query_key_layer_scaling",
    "no_rope_fusion",
)
CUDA = (
    "dataloader_pin_memory",
    "no_masked_softmax_fusion",
    "no_bias_dropout_fusion",
    "no_bias_swiglu_fusion",
    "no_gradient_accumulation_fusion",
    "offload_teacher_model",
    "overlap_cpu_optimizer_d2h_h2d",
    "pin_cpu_grads",
)
NEVER = {
    "ckpt_assume_constant_structure": "planning a save takes milliseconds for each layer, whatever its size",
    "auto_detect_ckpt_format": "the format of a checkpoint is always seen from its files",
    "attention_softmax_in_fp32": "every attention kernel computes its softmax in fp32",
    "cross_entropy_loss_fusion": "the loss is one fused vocabulary-parallel function in every case",
    "dataloader_persistent_workers": "threads build the batches, and they live as long as the run",
    "check_model": "a model's files are always checked against each other and its config.json, without asking a hub",
    "load_from_cache_file": "tokenized data is always reused when its sources and settings are unchanged",
    "no_initialization": "weights are loaded or drawn tensor by tensor and never initialised twice",
    "packing_num_proc": "packs are made in one pass over the lengths, and never depend on a number of processes",
    "mlp_padding_free": "rows have padding only where padding_free=False asks for it, and every layer computes it",
    "offload_bridge": "weights for rollout engines always leave the device tensor by tensor, in buckets on the host",
    "lazy_tokenize": "samples are tokenized once, into a cache, before the first step",
    "no_data_sharding": "rows are always shuffled over the whole dataset, independently of the layout",
    "use_cpu_initialization": "weights are always read, or drawn, on the CPU and copied to the device",
    "use_persistent_ckpt_worker": "each rank writes its checkpoints in a thread, which costs nothing to start",
    "load_safetensors": "safetensors are read whenever checkpoint.load is not given",
}
_LOSS_SCALE = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")


def settings_of_others(recipe: Recipe, shape: ModelShape) -> Iterator[tuple[str, str]]:
    """Settings that only another optimizer, precision or routing reads, with values; and why this run does not."""
    optimizer = recipe.optimizer.optimizer
    unread: list[tuple[str, tuple[str, ...], str]] = []
    if optimizer != "sgd":
        unread.append(("optimizer", ("sgd_momentum",), f"the optimizer is {optimizer}"))
    else:
        unread.append(("optimizer", ("adam_beta1", "adam_beta2", "adam_eps"), "the optimizer is sgd"))
    if (dtype := torch_dtype(recipe, shape)) != "float16":
        unread.append(("precision", _LOSS_SCALE, f"losses are scaled in float16, and the model's dtype is {dtype}"))
    if recipe.moe.moe_expert_capacity_factor is None:
        unread.append(("moe", ("moe_token_drop_policy",), "without moe_expert_capacity_factor no token is dropped"))
    for group, names, reason in unread:
        own = getattr(recipe, group)
        defaults = type(own)()
        for name in names:
            if getattr(own, name) != getattr(defaults, name):
                yield f"{group}.{name}={getattr(own, name)!r}", reason


def note_settings_without_effect(recipe: Recipe, shape: ModelShape, *, is_main: bool) -> None:
    """Logs one line for each setting that differs from its default and has no effect in this run."""
    if not is_main:
        return
    why_local = why_local_here(recipe, shape)
    for parameter in parameters(Recipe):
        value = getattr(getattr(recipe, parameter.group), parameter.name)
        reason = reason_without_effect(parameter, why_local=why_local)
        default = False if parameter.default is None else parameter.default  # None was derived: nobody asked for False
        if reason is not None and value is not None and value != default:
            logger.info("%s=%r has no effect here: %s", parameter.dotted, value, reason)
    for setting, reason in settings_of_others(recipe, shape):
        logger.info("%s has no effect here: %s", setting, reason)
    if compares_answers(recipe) and not recipe.rlhf.share_prompts and (reason := why_not(recipe, shape)) is not None:
        logger.info("rlhf.share_prompts: each answer has its prompt for itself, because %s", reason)
    if recipe.grpo.infer_batch_size is not None and not infers_alone(recipe):
        logger.info(
            "grpo.infer_batch_size=%d has no effect here: no pass in the ranks only computes log-probabilities: "
            "they have no reference and no teacher, and each round's first step is on its own policy",
            recipe.grpo.infer_batch_size,
        )
    if recipe.grpo.log_completions and recipe.logging.report_to is None:
        logger.info(
            "grpo.log_completions=True has no effect here: without report_to no tracker shows completions; the run "
            "keeps them all, see `megabatch completions`"
        )


def reason_without_effect(parameter: Parameter, *, why_local: str | None) -> str | None:
    """Why a setting has no effect here; None if it has one. Args: why_local: why the run has megatron-core's local
    layers, None where it has Transformer Engine's."""
    if parameter.name in NEVER:
        return NEVER[parameter.name]
    if parameter.name in TRANSFORMER_ENGINE and why_local is not None:
        return f"it is Transformer Engine's, and the run has local layers ({why_local})"
    if parameter.name in CUDA and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None
