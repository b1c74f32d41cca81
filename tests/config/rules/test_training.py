"""The length of a run, for when it saves and evaluates, and for its resources."""

from __future__ import annotations

import pytest

from megabatch.config.rules import training

STEPS = {"train_iters": 10, "max_epochs": None}
CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        training.epochs_have_no_intervals,
        "dense",
        {"checkpoint": {"save_strategy": "epoch", "save_interval": 100}},
        {"checkpoint": {"save_strategy": "epoch"}},
        "checkpoint.save_interval",
        ["no effect with save_strategy='epoch'"],
    ),
    (
        training.the_best_is_evaluated_and_saved,
        "dense",
        {"checkpoint": {"metric_for_best_model": "loss"}},
        {"checkpoint": {"metric_for_best_model": "loss"}, "data": {"split_dataset_ratio": 0.1}},
        "checkpoint.metric_for_best_model",
        ["needs validation data"],
    ),
    (
        training.the_best_is_evaluated_and_saved,
        "dense",
        {
            "checkpoint": {"metric_for_best_model": "loss", "save_interval": 10},
            "evaluation": {"eval_interval": 4},
            "data": {"split_dataset_ratio": 0.1},
        },
        {
            "checkpoint": {"metric_for_best_model": "loss", "save_interval": 8},
            "evaluation": {"eval_interval": 4},
            "data": {"split_dataset_ratio": 0.1},
        },
        "checkpoint.save_interval",
        ["multiple of eval_interval=4"],
    ),
    (
        training.the_best_is_evaluated_and_saved,
        "dense",
        {"checkpoint": {"greater_is_better": True}},
        {},
        "checkpoint.greater_is_better",
        ["needs metric_for_best_model"],
    ),
    (
        training.the_best_is_of_a_metric,
        "dense",
        {"checkpoint": {"metric_for_best_model": "eval_perplexty"}},
        {"checkpoint": {"metric_for_best_model": "eval_perplexity"}},
        "checkpoint.metric_for_best_model",
        ["no metric of this run's evaluation", "try perplexity"],
    ),
    (
        training.backend_fits_the_device,
        "dense",
        {"parallel": {"distributed_backend": "gloo"}, "resources": {"gpus_per_node": 8}},
        {"parallel": {"distributed_backend": "nccl"}, "resources": {"gpus_per_node": 8}},
        "parallel.distributed_backend",
        ["is for runs on CPUs", "try nccl"],
    ),
    (
        training.safetensors_are_saved_with_checkpoints,
        "dense",
        {"checkpoint": {"save_interval": 10, "save_safetensors_interval": 25}},
        {"checkpoint": {"save_interval": 5, "save_safetensors_interval": 10}},
        "checkpoint.save_safetensors_interval",
        ["must be a multiple of save_interval=10", "try 20 or 30"],
    ),
    (
        training.safetensors_are_saved_with_checkpoints,
        "dense",
        {"checkpoint": {"save_interval": 5, "save_safetensors_interval": 10, "no_save_optim": True}},
        {"checkpoint": {"save_interval": 5, "save_safetensors_interval": 10}},
        "checkpoint.save_safetensors_interval",
        ["leaves the checkpoints in between empty"],
    ),
    (
        training.safetensors_are_saved_with_checkpoints,
        "dense",
        {"checkpoint": {"save_interval": 5, "save_safetensors_interval": 10, "save_safetensors": False}},
        {"checkpoint": {"save_interval": 5, "save_safetensors_interval": 10}},
        "checkpoint.save_safetensors_interval",
        ["has no effect with save_safetensors=False"],
    ),
    (
        training.one_of_steps_and_epochs,
        "dense",
        {"training": {"train_iters": 10}},
        {"training": {**STEPS}},
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
