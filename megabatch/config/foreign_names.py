"""Flags of other programs that are no parameters here, and what serves their purpose instead.

Names that mean exactly what a parameter means are aliases in its declaration.
"""

from __future__ import annotations

from collections.abc import Mapping

OF_THE_CLUSTER = frozenset(
    ("partition", "account", "qos", "constraint", "reservation", "exclude", "modules", "nodelist", "exclusive")
) | {"sbatch", "environment", "env", "container", "licenses", "mail_user", "mail_type", "comment"}
"""Options of sbatch, and other settings of a cluster, that people look for among the flags."""

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
    # short names
    "tp": ("tensor_model_parallel_size",),
    "pp": ("pipeline_model_parallel_size",),
    "cp": ("context_parallel_size",),
    "ep": ("expert_model_parallel_size",),
    "etp": ("expert_tensor_parallel_size",),
    "vpp": ("num_virtual_stages_per_pipeline_rank",),
    "mbs": ("micro_batch_size",),
    "gbs": ("global_batch_size",),
    "expert_parallel_size": ("expert_model_parallel_size",),
    # transformers, TRL and LLaMA-Factory
    "max_grad_norm": ("clip_grad",),
    "lr_scheduler_type": ("lr_decay_style",),
    "run_name": ("wandb_exp_name",),
    "flash_attn": ("attention_backend flash",),
    "use_flash_attn": ("attention_backend flash",),
    "lora_r": ("lora_rank",),
    "lora_target": ("target_modules",),
    "lora_target_modules": ("target_modules",),
    "max_new_tokens": ("max_completion_length",),
    "model_id_or_path": ("model",),
    "train_file": ("dataset",),
    "validation_file": ("val_dataset",),
    "eval_dataset": ("val_dataset",),
    "evaluation_strategy": ("eval_interval",),
    "max_seq_length": ("max_length",),
    # Megatron-LM and NeMo
    "data_path": ("dataset",),
    "train_data_path": ("dataset",),
    "valid_data_path": ("val_dataset",),
    "split": ("split_dataset_ratio",),
    "sequence_length": ("max_length",),
    "encoder_seq_length": ("max_length",),
    "devices": ("gpus_per_node",),
    "num_nodes": ("nodes",),
    "gradient_clip_val": ("clip_grad",),
    "accumulate_grad_batches": ("global_batch_size",),
    "log_every_n_steps": ("log_interval",),
    "val_check_interval": ("eval_interval",),
    "limit_val_batches": ("eval_iters",),
    "activations_checkpoint_granularity": ("recompute_granularity",),
    "activations_checkpoint_method": ("recompute_method",),
    "activations_checkpoint_num_layers": ("recompute_num_layers",),
    # verl, whose batch sizes count prompts
    "kl_coef": ("beta",),
    "kl_loss_coef": ("beta",),
    "clip_ratio": ("epsilon",),
    "clip_ratio_low": ("epsilon",),
    "clip_ratio_high": ("epsilon_high",),
    "ppo_epochs": ("num_iterations",),
    "ppo_micro_batch_size_per_gpu": ("micro_batch_size",),
    "ppo_mini_batch_size": ("global_batch_size (completions, not prompts)",),
    "train_batch_size": ("generation_batch_size (completions, not prompts)",),
    "max_prompt_length": ("max_length",),
    "max_response_length": ("max_completion_length",),
    "rollout.n": ("num_generations",),
    "adv_estimator": ("advantage_estimator",),
    "total_epochs": ("max_epochs",),
    # launchers
    "nnodes": ("nodes",),
    "n_gpus_per_node": ("gpus_per_node",),
    "nproc_per_node": ("gpus_per_node", "tasks_per_node"),
    "gpus": ("gpus_per_node",),
    "gres": ("gpus_per_node",),
    "ntasks_per_node": ("tasks_per_node",),
    "mem": ("mem_gib",),
}
"""Other names, or parameters that serve the same purpose."""

_FSDP = "belongs to Megatron-FSDP, which is not built; use_distributed_optimizer shards the optimizer's state"
_MUON = "has no counterpart: beside Muon, AdamW updates what is not a matrix of a layer"
_FAMILY = "belongs to a family of models that is not built yet (docs/families.md)"
_FP4 = "belongs to FP4, which is not built"
_OFFLOAD = "has no counterpart: optimizer_cpu_offload has an Adam of its own, torch's on both sides"
_LAUNCHER = "has no counterpart: the launcher sets it"
_ALWAYS = "has no counterpart: it is always so"
_PREPARED = "has no counterpart: tokens are cached by content; `megabatch prepare RECIPE` makes the cache beforehand"
_SHARDS = "has no counterpart: use_distributed_optimizer, the default, shards the optimizer's state"
_CHAIN = (
    "has no counterpart in a run: runs that wait for each other are a chain, declared in a recipe file "
    "(docs/chains.md); --chain N queues one run as N jobs, each going on where the one before stopped"
)
_IDENTITY = "has no counterpart: write the name into the rows themselves"

WITHOUT: Mapping[str, str] = {
    **dict.fromkeys(("use_megatron_fsdp", "data_parallel_sharding_strategy", "strict_fsdp_dtensor_load"), _FSDP),
    "muon_scalar_optimizer": _MUON,
    **dict.fromkeys(("linear_decoupled_in_proj", "use_fused_mhc", "mhc_recompute_layer_num"), _FAMILY),
    **dict.fromkeys(("dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss", "apply_dsa_kernel_fusion"), _FAMILY),
    **dict.fromkeys(("csa_dense_mode", "engram_tokenizer_map", "mtp_shared_weights"), _FAMILY),
    **dict.fromkeys(("mtp_decoder_input_detach", "language_model_only", "model_kwargs"), _FAMILY),
    **dict.fromkeys(("fp4_format", "fp4_recipe", "fp4_param_gather"), _FP4),
    **dict.fromkeys(("use_torch_optimizer_for_cpu_offload", "pin_cpu_params"), _OFFLOAD),
    **dict.fromkeys(("local_rank", "skip_megatron_init"), _LAUNCHER),
    **dict.fromkeys(("dist_ckpt_optim_fully_reshardable", "create_checkpoint_symlink"), _ALWAYS),
    **dict.fromkeys(("cached_dataset", "cached_val_dataset"), _PREPARED),
    **dict.fromkeys(("model_author", "model_name"), _IDENTITY),
    **dict.fromkeys(("deepspeed", "zero_stage", "fsdp"), _SHARDS),
    **dict.fromkeys(("dependency", "afterok", "afterany", "afternotok", "singleton"), _CHAIN),
    "array": "has no counterpart: --sweep, or a Sweep in the recipe's file, submits job arrays (docs/sweeps.md)",
    "trust_remote_code": "has no counterpart: code in a model's folder is never run",
    "resume_from_checkpoint": "has no counterpart: the same command with the run's --run_dir resumes it, as does "
    "`megabatch resume RUN`; --load starts a new run from a checkpoint",
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
