"""Flags of other programs that are no parameters here, and what serves their purpose instead.

Names that mean exactly what a parameter means are aliases in its declaration.
"""

from __future__ import annotations

from collections.abc import Mapping

OF_THE_CLUSTER = frozenset(("partition", "account", "qos", "constraint", "reservation", "exclude", "modules"))
"""Options of sbatch that people look for among the flags."""

QLORA = frozenset(("quant_bits", "quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "qlora"))
"""Flags that train adapters beside quantised weights."""

OTHERWISE: Mapping[str, tuple[str, ...]] = {
    "per_device_train_batch_size": ("micro_batch_size",),
    "gradient_accumulation_steps": ("global_batch_size",),
    "warmup_ratio": ("lr_warmup_fraction",),
    "warmup_steps": ("lr_warmup_iters",),
    "max_steps": ("train_iters",),
    "truncation_mode": ("truncation_strategy left", "truncation_strategy right"),
    "gradient_checkpointing": ("recompute_granularity full",),
    "disable_dropout": ("hidden_dropout 0", "attention_dropout 0"),
    "router_aux_loss_coef": ("moe_aux_loss_coeff",),
    "pad_to_multiple_of": ("pad_to_max_length",),
    "activation_offloading": ("recompute_granularity full",),
    "model_name_or_path": ("model",),
    "ref_model_name_or_path": ("ref_model",),
    "ddp_timeout": ("distributed_timeout_minutes (minutes, not seconds)",),
    "moe_layer_recompute": ("recompute_granularity selective --recompute_modules moe",),
    "add_non_thinking_prefix": ("loss_scale default+ignore_empty_think",),
    "use_chat_template": ("task sft", "loss_scale all"),
}
"""Other names, or parameters that serve the same purpose."""

_FSDP = "belongs to Megatron-FSDP, which is not built; use_distributed_optimizer shards the optimizer's state"
_MUON = "belongs to optimizer=muon, which is refused (docs/parameters.md says why)"
_FAMILY = "belongs to a family of models that is not built yet (docs/families.md)"
_FP4 = "belongs to FP4, which is not built"
_LAUNCHER = "has no counterpart: the launcher sets it"
_ALWAYS = "has no counterpart: it is always so"
_PREPARED = "has no counterpart: tokens are cached by content; `megabatch prepare RECIPE` makes the cache beforehand"
_IDENTITY = "has no counterpart: write the name into the rows themselves"

WITHOUT: Mapping[str, str] = {
    **dict.fromkeys(("use_megatron_fsdp", "data_parallel_sharding_strategy", "strict_fsdp_dtensor_load"), _FSDP),
    **dict.fromkeys(("muon_momentum", "muon_split_qkv", "muon_use_nesterov", "muon_scale_mode"), _MUON),
    **dict.fromkeys(("muon_fp32_matmul_prec", "muon_coefficient_type", "muon_num_ns_steps", "muon_tp_mode"), _MUON),
    **dict.fromkeys(("muon_extra_scale_factor", "muon_scalar_optimizer", "muon_lr", "muon_min_lr"), _MUON),
    **dict.fromkeys(("linear_decoupled_in_proj", "use_fused_mhc", "mhc_recompute_layer_num"), _FAMILY),
    **dict.fromkeys(("dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss", "apply_dsa_kernel_fusion"), _FAMILY),
    **dict.fromkeys(("csa_dense_mode", "engram_tokenizer_map", "mtp_shared_weights"), _FAMILY),
    **dict.fromkeys(("mtp_decoder_input_detach", "language_model_only", "model_kwargs"), _FAMILY),
    **dict.fromkeys(("fp4_format", "fp4_recipe", "fp4_param_gather"), _FP4),
    **dict.fromkeys(("local_rank", "skip_megatron_init"), _LAUNCHER),
    **dict.fromkeys(("dist_ckpt_optim_fully_reshardable", "create_checkpoint_symlink"), _ALWAYS),
    **dict.fromkeys(("cached_dataset", "cached_val_dataset"), _PREPARED),
    **dict.fromkeys(("model_author", "model_name"), _IDENTITY),
    "external_plugins": "has no counterpart: functions and classes are named where they are used, as file.py:name "
    "(reward_funcs, preprocess, callbacks, multi_turn_scheduler)",
    "agent_template": "has no counterpart: the model's own chat template writes tools and calls",
    "remove_unused_columns": "has no counterpart: columns that nothing reads are counted in the log",
    "config": "has no counterpart: a recipe is a Python file (docs/recipes.md)",
    "load_args": "has no counterpart: `megabatch resume RUN` goes on with a run's own parameters",
    "vllm_use_async_engine": "has no counterpart: servers take requests as they come",
    "vllm_data_parallel_size": "has no counterpart: start several servers; vllm_server_base_url names them all",
}
"""Other names → why there is no such parameter."""
