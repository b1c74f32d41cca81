"""Learning rate, weight decay, optimizer state and number formats."""

from __future__ import annotations

import pytest

from megabatch.config.rules import optimization

RISES = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1}
AWARE = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"}
HALF = {"model": {"torch_dtype": "bfloat16"}}
HOST = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        optimization.reduced_state_has_its_optimizer,
        "dense",
        {"optimizer": {"exp_avg_dtype": "bf16"}, **HALF},
        {"optimizer": AWARE, **HALF},
        "optimizer.exp_avg_dtype",
        ["needs use_precision_aware_optimizer=True"],
    ),
    (
        optimization.reduced_state_has_its_optimizer,
        "dense",
        {"optimizer": AWARE, **HALF, "resources": {"gpus_per_node": 0, "tasks_per_node": 8}},
        {"optimizer": AWARE, **HALF},
        "optimizer.use_precision_aware_optimizer",
        ["needs Transformer Engine's Adam, which runs on GPUs", "gpus_per_node is 0"],
    ),
    (
        optimization.reduced_state_has_its_optimizer,
        "dense",
        {"optimizer": AWARE, "model": {"torch_dtype": "float32"}},
        {"optimizer": AWARE, **HALF},
        "optimizer.use_precision_aware_optimizer",
        ["torch_dtype to be 'bfloat16', which is 'float32'"],
    ),
    (
        optimization.offloaded_state_is_adams,
        "dense",
        {"optimizer": {"optimizer_offload_fraction": 0.5}},
        {"optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}},
        "optimizer.optimizer_offload_fraction",
        ["needs optimizer_cpu_offload=True", "try 1.0"],
    ),
    (
        optimization.offloaded_state_is_adams,
        "dense",
        {"optimizer": {"overlap_cpu_optimizer_d2h_h2d": True}},
        {"optimizer": {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True}},
        "optimizer.overlap_cpu_optimizer_d2h_h2d",
        ["needs optimizer_cpu_offload=True", "try False"],
    ),
    (
        optimization.offloaded_state_is_adams,
        "dense",
        {"optimizer": {"optimizer_cpu_offload": True}, "parallel": {"use_distributed_optimizer": False}},
        {"optimizer": {"optimizer_cpu_offload": True}},
        "optimizer.optimizer_cpu_offload",
        ["needs parallel.use_distributed_optimizer=True"],
    ),
    (
        optimization.offloaded_state_is_adams,
        "dense",
        {"optimizer": {**HOST, "exp_avg_dtype": "bf16"}, **HALF},
        {"optimizer": {**HOST, "main_grads_dtype": "bf16"}, **HALF},
        "optimizer.exp_avg_dtype",
        ["keeps its state in fp32"],
    ),
    (
        optimization.reduced_state_has_its_optimizer,
        "dense",
        {"optimizer": AWARE, **HALF, "parallel": {"use_distributed_optimizer": False}},
        {"optimizer": AWARE, **HALF},
        "optimizer.use_precision_aware_optimizer",
        ["needs parallel.use_distributed_optimizer=True"],
    ),
    (
        optimization.stable_phase_ends,
        "dense",
        {"learning_rate": {"lr_decay_style": "WSD"}},
        {"learning_rate": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5}},
        "learning_rate.lr_wsd_decay_iters",
        ["lr_decay_style='WSD' needs it"],
    ),
    (
        optimization.stable_phase_ends,
        "dense",
        {
            "learning_rate": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 95, "lr_warmup_iters": 10},
            "training": {"train_iters": 100},
        },
        {
            "learning_rate": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 90, "lr_warmup_iters": 10},
            "training": {"train_iters": 100},
        },
        "learning_rate.lr_wsd_decay_iters",
        ["at most 90", "try 9"],
    ),
    (
        optimization.stable_phase_ends,
        "dense",
        {"learning_rate": {"lr_wsd_decay_style": "linear"}},
        {},
        "learning_rate.lr_wsd_decay_style",
        ["needs lr_decay_style='WSD', which is 'cosine'"],
    ),
    (
        optimization.norms_to_decay_exist,
        "dense",
        {"optimizer": {"apply_wd_to_qk_layernorm": True}},
        {},
        "optimizer.apply_wd_to_qk_layernorm",
        ["llama has no norms"],
    ),
    (
        optimization.loss_scale_has_a_range,
        "dense",
        {"precision": {"initial_loss_scale": 2.0, "min_loss_scale": 4.0}},
        {"precision": {"initial_loss_scale": 4.0, "min_loss_scale": 4.0}},
        "precision.min_loss_scale",
        ["at most initial_loss_scale=2"],
    ),
    (
        optimization.warmup_is_said_once,
        "dense",
        {"learning_rate": {"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}},
        {"learning_rate": {"lr_warmup_iters": 5}},
        "learning_rate.lr_warmup_iters",
        ["lr_warmup_fraction=0.1"],
    ),
    (
        optimization.warmup_is_said_once,
        "dense",
        {"learning_rate": {"lr_warmup_iters": 10, "lr_decay_iters": 10}},
        {"learning_rate": {"lr_warmup_iters": 9, "lr_decay_iters": 10}},
        "learning_rate.lr_warmup_iters",
        ["below the 10 steps", "try 9"],
    ),
    (
        optimization.learning_rate_is_above_its_floor,
        "dense",
        {"learning_rate": {"min_lr": 1e-3}},
        {"learning_rate": {"min_lr": 1e-3, "lr": 1e-2}},
        "learning_rate.min_lr",
        ["at most lr=1e-05"],
    ),
    (
        optimization.learning_rate_is_above_its_floor,
        "dense",
        {"learning_rate": {"lr_warmup_init": 1e-3, "lr_warmup_iters": 2}},
        {"learning_rate": {"lr_warmup_init": 1e-6, "lr_warmup_iters": 2}},
        "learning_rate.lr_warmup_init",
        ["at most lr=1e-05"],
    ),
    (
        optimization.learning_rate_is_above_its_floor,
        "dense",
        {"learning_rate": {"lr_warmup_init": 1e-6}},
        {"learning_rate": {"lr_warmup_init": 1e-6, "lr_warmup_fraction": 0.1}},
        "learning_rate.lr_warmup_init",
        ["no effect without lr_warmup_iters"],
    ),
    (
        optimization.weight_decay_is_said_once,
        "dense",
        {"optimizer": {"end_weight_decay": 0.1}},
        {"optimizer": RISES},
        "optimizer.end_weight_decay",
        ["needs weight_decay_incr_style linear or cosine"],
    ),
    (
        optimization.weight_decay_is_said_once,
        "dense",
        {"optimizer": {**RISES, "start_weight_decay": None}},
        {"optimizer": RISES},
        "optimizer.start_weight_decay",
        ["is missing: weight_decay_incr_style='linear' needs it"],
    ),
    (
        optimization.weight_decay_is_said_once,
        "dense",
        {"optimizer": {**RISES, "start_weight_decay": 0.2}},
        {"optimizer": RISES},
        "optimizer.end_weight_decay",
        ["at least start_weight_decay=0.2"],
    ),
    (
        optimization.precision_is_said_once,
        "dense",
        {"precision": {"fp16": True, "bf16": True}, "model": {"torch_dtype": None}},
        {"precision": {"bf16": True}, "model": {"torch_dtype": None}},
        "precision.fp16",
        ["bf16=True exclude each other"],
    ),
    (
        optimization.precision_is_said_once,
        "dense",
        {"precision": {"bf16": True}},
        {"precision": {"bf16": False}},
        "precision.bf16",
        ["torch_dtype='float32'", "try False"],
    ),
    (
        optimization.precision_is_said_once,
        "dense",
        {"training": {"deterministic_mode": True}, "kernels": {"cross_entropy_loss_fusion": True}},
        {"kernels": {"cross_entropy_loss_fusion": True}},
        "kernels.cross_entropy_loss_fusion",
        ["deterministic_mode"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(optimization.RULES)
