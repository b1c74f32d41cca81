"""What a run reads and how rows are made of it."""

from __future__ import annotations

import pytest

from megabatch.config.rules import datasets

STEPS = {"train_iters": 10, "max_epochs": None}
CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        datasets.padding_and_packing_agree,
        "dense",
        {"data": {"padding_free": False, "packing": True}},
        {"data": {"padding_free": False}},
        "data.padding_free",
        ["packing=True lays them end to end"],
    ),
    (
        datasets.one_pass_has_one_epoch,
        "dense",
        {"data": {"dataloader_type": "single"}, "training": {"max_epochs": 2}},
        {"data": {"dataloader_type": "single"}, "training": {"max_epochs": 1}},
        "data.dataloader_type",
        ["one pass", "max_epochs=2", "try cyclic"],
    ),
    (
        datasets.scales_weigh_conversations,
        "dense",
        {"task": "pt", "data": {"loss_scale": "all+hermes"}},
        {"task": "pt", "data": {"loss_scale": "all"}},
        "data.loss_scale",
        ["task='pt' reads plain texts"],
    ),
    (
        datasets.seq_length_says_nothing_else,
        "dense",
        {"data": {"seq_length": 64, "max_length": 128}},
        {"data": {"seq_length": 128, "max_length": 128}},
        "data.seq_length",
        ["must equal max_length=128", "try max_length=64"],
    ),
    (
        datasets.only_documents_are_cut_into_pieces,
        "dense",
        {"data": {"truncation_strategy": "split"}},
        {"data": {"truncation_strategy": "right"}},
        "data.truncation_strategy",
        ["is for task='pt', not 'sft'", "try right or delete"],
    ),
    (
        datasets.data_is_given,
        "dense",
        {"data": {"dataset": []}},
        {"data": {"dataset": ["a#500", "b"]}},
        "data.dataset",
        ["data.dataset is missing"],
    ),
    (
        datasets.data_is_given,
        "dense",
        {"data": {"val_dataset": ["b"], "split_dataset_ratio": 0.1}},
        {"data": {"split_dataset_ratio": 0.1}},
        "data.split_dataset_ratio",
        ["with val_dataset", "try 0"],
    ),
    (
        datasets.data_is_given,
        "dense",
        {"data": {"packing_length": 128}},
        {"data": {"packing_length": 128, "packing": True}},
        "data.packing_length",
        ["needs packing"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {"data": {"streaming": True}, "training": {"train_iters": None, "max_epochs": None}},
        {"data": {"streaming": True}, "training": {**STEPS}},
        "data.streaming",
        ["needs train_iters"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {"data": {"streaming": True}, "training": {"train_iters": 10, "max_epochs": 3}},
        {"data": {"streaming": True}, "training": {**STEPS}},
        "data.streaming",
        ["max_epochs=3", "set train_iters alone"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {"data": {"streaming": True, "split_dataset_ratio": 0.1}, "training": {**STEPS}},
        {"data": {"streaming": True, "val_dataset": ["b"]}, "training": {**STEPS}},
        "data.split_dataset_ratio",
        ["give val_dataset"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {
            "data": {"streaming": True, "dataloader_type": "single"},
            "training": {**STEPS},
        },
        {
            "data": {"streaming": True, "dataloader_type": "external"},
            "training": {**STEPS},
        },
        "data.dataloader_type",
        ["try external"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {"data": {"dataloader_type": "external"}, "training": {**STEPS}},
        {"data": {"dataloader_type": "single"}, "training": {**STEPS}},
        "data.dataloader_type",
        ["is what streaming=True uses"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {"data": {"streaming": True, "group_by_length": True}, "training": {**STEPS}},
        {"data": {"group_by_length": True}, "training": {**STEPS}},
        "data.group_by_length",
        ["the lengths of all samples"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {"data": {"streaming": True, "pad_to_max_length": True}, "training": {**STEPS}},
        {"data": {"pad_to_max_length": True}, "training": {**STEPS}},
        "data.pad_to_max_length",
        ["the lengths of all samples"],
    ),
    (
        datasets.streaming_needs_no_whole_dataset,
        "dense",
        {
            "data": {"streaming": True},
            "training": {**STEPS, "enable_channel_loss": True},
        },
        {"data": {}, "training": {**STEPS, "enable_channel_loss": True}},
        "training.enable_channel_loss",
        ["channels of all samples"],
    ),
    (
        datasets.template_variables_are_said_once,
        "dense",
        {"data": {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False}}},
        {"data": {"enable_thinking": False, "chat_template_kwargs": {"date_string": "1 May"}}},
        "data.enable_thinking",
        ["and chat_template_kwargs both set it"],
    ),
    (
        datasets.template_variables_are_said_once,
        "dense",
        {"task": "pt", "data": {"enable_thinking": False}},
        {"task": "pt"},
        "data.enable_thinking",
        ["pt renders no chat template"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(datasets.RULES)
