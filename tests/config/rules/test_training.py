"""Data, length, learning rate, recomputation, precision, task and resources."""

from __future__ import annotations

import pytest

from megabatch.config.rules import training

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {**FULL, "recompute_method": "block"}
PP2 = {"pipeline_model_parallel_size": 2}

CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        training.backend_fits_the_device,
        "dense",
        {"parallel": {"distributed_backend": "gloo"}, "resources": {"gpus_per_node": 8}},
        {"parallel": {"distributed_backend": "nccl"}, "resources": {"gpus_per_node": 8}},
        "parallel.distributed_backend",
        ["is for runs on CPUs", "try nccl"],
    ),
    (
        training.seq_length_says_nothing_else,
        "dense",
        {"data": {"seq_length": 64, "max_length": 128}},
        {"data": {"seq_length": 128, "max_length": 128}},
        "data.seq_length",
        ["must equal max_length=128", "try 128"],
    ),
    (
        training.data_is_given,
        "dense",
        {"data": {"dataset": []}},
        {"data": {"dataset": ["a#500", "b"]}},
        "data.dataset",
        ["data.dataset is missing"],
    ),
    (
        training.data_is_given,
        "dense",
        {"data": {"val_dataset": ["b"], "split_dataset_ratio": 0.1}},
        {"data": {"split_dataset_ratio": 0.1}},
        "data.split_dataset_ratio",
        ["beside val_dataset", "try 0"],
    ),
    (
        training.data_is_given,
        "dense",
        {"data": {"packing_length": 128}},
        {"data": {"packing_length": 128, "packing": True}},
        "data.packing_length",
        ["needs packing"],
    ),
    (
        training.data_is_given,
        "dense",
        {"data": {"streaming": True}},
        {"data": {"streaming": True}, "training": {"train_iters": 10}},
        "data.streaming",
        ["train_iters"],
    ),
    (
        training.one_of_steps_and_epochs,
        "dense",
        {"training": {"train_iters": 10}},
        {"training": {"train_iters": 10, "max_epochs": None}},
        "training.train_iters",
        ["max_epochs=1", "set one of them to None"],
    ),
    (
        training.one_of_steps_and_epochs,
        "dense",
        {"training": {"max_epochs": None}},
        {"training": {"max_epochs": 3}},
        "training.train_iters",
        ["missing", "max_epochs"],
    ),
    (
        training.warmup_is_said_once,
        "dense",
        {"learning_rate": {"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}},
        {"learning_rate": {"lr_warmup_iters": 5}},
        "learning_rate.lr_warmup_iters",
        ["lr_warmup_fraction=0.1"],
    ),
    (
        training.warmup_is_said_once,
        "dense",
        {"learning_rate": {"lr_warmup_iters": 10, "lr_decay_iters": 10}},
        {"learning_rate": {"lr_warmup_iters": 9, "lr_decay_iters": 10}},
        "learning_rate.lr_warmup_iters",
        ["below the 10 steps"],
    ),
    (
        training.learning_rate_is_above_its_floor,
        "dense",
        {"learning_rate": {"min_lr": 1e-3}},
        {"learning_rate": {"min_lr": 1e-3, "lr": 1e-2}},
        "learning_rate.min_lr",
        ["at most lr=1e-05"],
    ),
    (
        training.recompute_is_consistent,
        "dense",
        {"recompute": {"recompute_granularity": "full", "recompute_num_layers": 1}},
        {"recompute": FULL},
        "recompute.recompute_granularity",
        ["recompute_method"],
    ),
    (
        training.recompute_is_consistent,
        "dense",
        {"recompute": {"recompute_granularity": "full", "recompute_method": "block"}},
        {"recompute": BLOCK},
        "recompute.recompute_granularity",
        ["recompute_num_layers=1"],
    ),
    (
        training.recompute_is_consistent,
        "dense",
        {"recompute": {"recompute_method": "block"}},
        {"recompute": {"recompute_granularity": "none"}},
        "recompute.recompute_method",
        ["recompute_granularity='full'", "'selective'"],
    ),
    (
        training.recompute_is_consistent,
        "dense",
        {"recompute": {**FULL, "recompute_modules": ["mlp"]}},
        {"recompute": {"recompute_modules": ["mlp"]}},
        "recompute.recompute_modules",
        ["'selective'", "'full'"],
    ),
    (
        training.recompute_modules_exist,
        "dense",
        {"recompute": {"recompute_modules": ["core_attn", "moe"]}},
        {"recompute": {"recompute_modules": ["core_attn", "mlp"]}},
        "recompute.recompute_modules",
        ["'moe'", "no experts"],
    ),
    (
        training.recompute_modules_exist,
        "experts",
        {"recompute": {"recompute_modules": ["moe_act"]}, "moe": {"moe_grouped_gemm": False}},
        {"recompute": {"recompute_modules": ["moe_act"]}},
        "recompute.recompute_modules",
        ["moe_grouped_gemm"],
    ),
    (
        training.recompute_modules_exist,
        "dense",
        {"recompute": {"recompute_modules": ["mla_up_proj"]}},
        {"recompute": {"recompute_modules": ["mla_up_proj"]}, "mla": {"multi_latent_attention": True}},
        "recompute.recompute_modules",
        ["multi_latent_attention"],
    ),
    (
        training.recompute_units_divide,
        "given dense",
        {"recompute": {**FULL, "recompute_num_layers": 4}, "parallel": PP2},
        {"recompute": {**FULL, "recompute_num_layers": 2}, "parallel": PP2},
        "recompute.recompute_num_layers",
        ["must divide the 2 layers", "try 2"],
    ),
    (
        training.recompute_units_divide,
        "dense",
        {"recompute": {**BLOCK, "recompute_num_layers": 3}, "parallel": PP2},
        {"recompute": {**BLOCK, "recompute_num_layers": 3}},
        "recompute.recompute_num_layers",
        ["at most the 2 layers"],
    ),
    (
        training.precision_is_said_once,
        "dense",
        {"precision": {"fp16": True, "bf16": True}, "model": {"torch_dtype": None}},
        {"precision": {"bf16": True}, "model": {"torch_dtype": None}},
        "precision.fp16",
        ["bf16=True exclude each other"],
    ),
    (
        training.precision_is_said_once,
        "dense",
        {"precision": {"bf16": True}},
        {"precision": {"bf16": False}},
        "precision.bf16",
        ["torch_dtype='float32'", "try False"],
    ),
    (
        training.precision_is_said_once,
        "dense",
        {"training": {"deterministic_mode": True}, "kernels": {"cross_entropy_loss_fusion": True}},
        {"kernels": {"cross_entropy_loss_fusion": True}},
        "kernels.cross_entropy_loss_fusion",
        ["deterministic_mode"],
    ),
    (
        training.task_and_algorithm_agree,
        "dense",
        {"rlhf": {"rlhf_type": "grpo"}},
        {"rlhf": {"rlhf_type": "grpo"}, "task": "rlhf"},
        "rlhf.rlhf_type",
        ["needs task='rlhf'", "'sft'"],
    ),
    (
        training.task_and_algorithm_agree,
        "dense",
        {"rlhf": {"rlhf_type": "gkd"}, "task": "rlhf"},
        {"rlhf": {"rlhf_type": "gkd"}, "task": "rlhf", "gkd": {"teacher_model": "big"}},
        "gkd.teacher_model",
        ["teacher"],
    ),
    (
        training.task_and_algorithm_agree,
        "dense",
        {"grpo": {"reward_funcs": ["accuracy"], "reward_weights": [1.0, 2.0]}},
        {"grpo": {"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0, 2.0]}},
        "grpo.reward_weights",
        ["each of the 1 reward_funcs"],
    ),
    (
        training.task_and_algorithm_agree,
        "dense",
        {"training": {"task_type": "seq_cls"}},
        {"training": {"task_type": "seq_cls", "num_labels": 2}},
        "training.num_labels",
        ["seq_cls needs it"],
    ),
    (
        training.task_and_algorithm_agree,
        "dense",
        {"task": "pt", "training": {"task_type": "embedding"}},
        {"task": "sft", "training": {"task_type": "embedding"}},
        "training.task_type",
        ["needs task='sft'", "'pt'"],
    ),
    (
        training.task_and_algorithm_agree,
        "dense",
        {"training": {"num_labels": 2}},
        {},
        "training.num_labels",
        ["'causal_lm'"],
    ),
    (
        training.backend_fits_the_device,
        "dense",
        {"resources": {"gpus_per_node": 0}},
        {"resources": {"gpus_per_node": 0}, "parallel": {"distributed_backend": "gloo"}},
        "parallel.distributed_backend",
        ["gpus_per_node is 0", "try gloo"],
    ),
    (
        training.each_rank_has_its_gpu,
        "dense",
        {"resources": {"tasks_per_node": 9}},
        {"resources": {"tasks_per_node": 9, "gpus_per_node": 0}},
        "resources.tasks_per_node",
        ["gpus_per_node=8", "try 8"],
    ),
    (
        training.time_covers_the_signal,
        "dense",
        {"resources": {"time": "1"}},
        {"resources": {"time": "1", "signal_delay_s": 20}},
        "resources.signal_delay_s",
        ["below time='1', which is 60 s", "try 15"],
    ),
    (
        training.time_covers_the_signal,
        "dense",
        {"resources": {"time": "two hours"}},
        {"resources": {"time": "1-12"}},
        "resources.time",
        ["hours:minutes:seconds"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(training.RULES)
