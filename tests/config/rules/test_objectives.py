"""The task, and for what its objective reads."""

from __future__ import annotations

import pytest

from megabatch.config.rules import objectives

CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        objectives.task_and_algorithm_agree,
        "dense",
        {"training": {"problem_type": "regression"}},
        {"training": {"problem_type": "regression", "task_type": "seq_cls", "num_labels": 1}},
        "training.problem_type",
        ["needs task_type='seq_cls'", "'causal_lm'"],
    ),
    (
        objectives.task_and_algorithm_agree,
        "dense",
        {"training": {"problem_type": "single_label_classification", "task_type": "seq_cls", "num_labels": 1}},
        {"training": {"problem_type": "single_label_classification", "task_type": "seq_cls", "num_labels": 2}},
        "training.num_labels",
        ["at least 2"],
    ),
    (
        objectives.scores_are_of_samples,
        "dense",
        {"training": {"task_type": "seq_cls", "num_labels": 2, "calculate_per_token_loss": True}},
        {"training": {"task_type": "seq_cls", "num_labels": 2, "calculate_per_token_loss": False}},
        "training.calculate_per_token_loss",
        ["seq_cls has one loss for each sample"],
    ),
    (
        objectives.scores_are_of_samples,
        "dense",
        {"training": {"task_type": "seq_cls", "num_labels": 2}, "data": {"loss_scale": "all"}},
        {"training": {"task_type": "seq_cls", "num_labels": 2}},
        "data.loss_scale",
        ["seq_cls has one loss for each sample"],
    ),
    (
        objectives.scores_are_of_samples,
        "dense",
        {"task": "rlhf", "rlhf": {"rlhf_type": "prm"}, "training": {"calculate_per_token_loss": True}},
        {"task": "rlhf", "rlhf": {"rlhf_type": "prm"}},
        "training.calculate_per_token_loss",
        ["prm has one loss for each scored token"],
    ),
    (
        objectives.steps_are_kept,
        "dense",
        {"task": "rlhf", "rlhf": {"rlhf_type": "prm"}, "data": {"truncation_strategy": "right"}},
        {"task": "rlhf", "rlhf": {"rlhf_type": "prm"}, "data": {"truncation_strategy": "left"}},
        "data.truncation_strategy",
        ["cuts off an answer's last steps", "try delete or left"],
    ),
    (
        objectives.steps_are_kept,
        "dense",
        {"task": "rlhf", "rlhf": {"rlhf_type": "prm"}, "prm": {"step_separator": ""}},
        {"task": "rlhf", "rlhf": {"rlhf_type": "prm"}, "prm": {"step_separator": "<extra_0>"}},
        "prm.step_separator",
        ["must be a text that is not empty"],
    ),
    (
        objectives.embeddings_are_consistent,
        "dense",
        {"training": {"task_type": "embedding"}, "embedding": {"mrl_dims": [8, 64]}},
        {"training": {"task_type": "embedding"}, "embedding": {"mrl_dims": [8, 16]}},
        "embedding.mrl_dims",
        ["hidden_size=64"],
    ),
    (
        objectives.embeddings_are_consistent,
        "dense",
        {"training": {"task_type": "embedding"}, "embedding": {"mrl_dims": [8], "mrl_weights": [1.0, 0.5]}},
        {"training": {"task_type": "embedding"}, "embedding": {"mrl_dims": [8], "mrl_weights": [0.5]}},
        "embedding.mrl_weights",
        ["each of the 1 mrl_dims"],
    ),
    (
        objectives.task_and_algorithm_agree,
        "dense",
        {"rlhf": {"rlhf_type": "grpo"}},
        {"rlhf": {"rlhf_type": "grpo"}, "task": "rlhf"},
        "rlhf.rlhf_type",
        ["needs task='rlhf'", "'sft'"],
    ),
    (
        objectives.task_and_algorithm_agree,
        "dense",
        {"grpo": {"reward_funcs": ["accuracy"], "reward_weights": [1.0, 2.0]}},
        {"grpo": {"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0, 2.0]}},
        "grpo.reward_weights",
        ["each of the 1 reward_funcs"],
    ),
    (
        objectives.task_and_algorithm_agree,
        "dense",
        {"training": {"task_type": "seq_cls"}},
        {"training": {"task_type": "seq_cls", "num_labels": 2}},
        "training.num_labels",
        ["seq_cls needs it"],
    ),
    (
        objectives.task_and_algorithm_agree,
        "dense",
        {"task": "pt", "training": {"task_type": "embedding"}},
        {"task": "sft", "training": {"task_type": "embedding"}},
        "training.task_type",
        ["needs task='sft'", "'pt'"],
    ),
    (
        objectives.task_and_algorithm_agree,
        "dense",
        {"training": {"num_labels": 2}},
        {},
        "training.num_labels",
        ["'causal_lm'"],
    ),
    (
        objectives.answers_differ_and_are_asked_for,
        "dense",
        {"training": {"task_type": "generative_reranker"}, "data": {"truncation_strategy": "right"}},
        {"training": {"task_type": "generative_reranker"}, "data": {"truncation_strategy": "left"}},
        "data.truncation_strategy",
        ["where the answer begins"],
    ),
    (
        objectives.answers_differ_and_are_asked_for,
        "dense",
        {"training": {"task_type": "generative_reranker"}, "reranker": {"generative_reranker_negative_token": "yes"}},
        {"training": {"task_type": "generative_reranker"}},
        "reranker.generative_reranker_positive_token",
        ["the answers must differ"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(objectives.RULES)
