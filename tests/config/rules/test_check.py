"""All faults at once: of single fields, of what is not built, and between fields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megabatch.config.declare import parameters
from megabatch.config.recipe import Recipe
from megabatch.config.rules.check import RULES, check

INVALID = [
    ({"batch": {"global_batch_size": "ten"}}, "batch.global_batch_size='ten' must be a whole number, not str"),
    ({"batch": {"micro_batch_size": True}}, "batch.micro_batch_size=True must be a whole number, not bool"),
    ({"batch": {"micro_batch_size": 0}}, "batch.micro_batch_size=0 must be at least 1"),
    (
        {"optimizer": {"optimizer": "adamw"}},
        "optimizer.optimizer='adamw' must be one of 'adam', 'sgd', 'muon'; try adam",
    ),
    ({"optimizer": {"adam_beta1": 1.0}}, "optimizer.adam_beta1=1.0 must be at least 0 and below 1"),
    ({"learning_rate": {"lr": float("nan")}}, "learning_rate.lr=nan must be a number or None, and finite"),
    (
        {"grpo": {"reward_weights": (float("inf"), 1.0)}},
        "grpo.reward_weights=(inf, 1.0) must be a list of numbers or None, and finite",
    ),
    ({"learning_rate": {"lr": 10**400}}, f"learning_rate.lr={10**400} must be a number or None, and finite"),
    ({"data": {"dataset": "train.jsonl"}}, "data.dataset='train.jsonl' must be a list of texts, not str"),
    ({"data": {"dataset": ["a", 1]}}, "data.dataset=('a', 1) must be a list of texts, not a list with int and str"),
    ({"model": {"num_layers": 10**23}}, "model.num_layers=100000000000000000000000 must be below 2^63"),
    ({"model": {"num_layers": 10**9}}, "model.num_layers=1000000000 must be at least 1 and at most 10000"),
    (
        {"parallel": {"tensor_model_parallel_size": 1 << 40}},
        "parallel.tensor_model_parallel_size=1099511627776 must be at least 1 and at most 1048576",
    ),
    ({"training": {"train_iters": 1 << 63}}, "training.train_iters=9223372036854775808 must be below 2^63"),
    ({"data": {"template": "qwen3"}}, "data.template='qwen3' must be one of 'chatml', 'plain' or None"),
    (
        {"data": {"columns": {"q": 1}}},
        "data.columns={'q': 1} must be a mapping (JSON object) to texts or None, not dict",
    ),
    (
        {"training": {"megatron_extra_kwargs": {"x": object}}},
        "training.megatron_extra_kwargs={'x': <class 'object'>} must be a mapping (JSON object) or None, not dict",
    ),
    (
        {"data": {"loss_scale": "last_round+hermess"}},
        "data.loss_scale='last_round+hermess' must be one of default, last_round, all, and behind it with '+' any of "
        "react, alpha_umi, qwen, agentflan, hermes, ignore_empty_think, ignore_think_prefix, not 'hermess'; try "
        "hermes",
    ),
    (
        {"checkpoint": {"max_shard_size": "5 elephants"}},
        "checkpoint.max_shard_size='5 elephants' must be a number with B, KB, MB, GB or GiB; try 5GB",
    ),
    ({"data": {"dataset": [""]}}, "data.dataset=[''] has a blank item; leave it out"),
    ({"data": {"val_dataset": ["a", " "]}}, "data.val_dataset=['a', ' '] has a blank item; leave it out"),
    ({"data": {"dataset": ["#100"]}}, "data.dataset=['#100'] has a blank item; leave it out"),
    ({"data": {"dataset": ["hf::"]}}, "data.dataset=['hf::'] has a blank item; leave it out"),
    ({"tuner": {"freeze_parameters": [""]}}, "tuner.freeze_parameters=[''] has a blank item; leave it out"),
    ({"checkpoint": {"save": ""}}, "checkpoint.save='' is blank; give a value, or leave it out"),
    ({"checkpoint": {"load": "\t"}}, "checkpoint.load='\\t' is blank; give a value, or leave it out"),
    ({"task": "stf"}, "task='stf' must be one of 'pt', 'sft', 'rlhf'"),
    (
        {"name": "my run"},
        "name='my run' must be letters, digits, '.', '-' and '_', and begin with a letter or digit",
    ),
]


def test_bases_pass(dense, experts):
    assert check(dense) == []
    assert check(experts) == []


@pytest.mark.parametrize(("changes", "text"), INVALID)
def test_single_fields(dense, changed, changes, text):
    assert [str(fault) for fault in check(changed(dense, changes))] == [text]


def test_a_token_is_refused_and_never_shown(dense, changed):
    for token in ("hf_aBcD1234", "hf_aBcD1234 ", "A" * 65):
        (fault,) = check(changed(dense, {"bridge": {"hub_token": token}}))
        assert fault.field == "bridge.hub_token"
        assert token.strip() not in f"{fault} {fault!r}"
    assert check(changed(dense, {"bridge": {"hub_token": "HF_TOKEN"}})) == []


def test_everything_is_reported_together(dense, changed):
    recipe = changed(
        dense,
        {
            "batch": {"global_batch_size": 10},
            "optimizer": {"weight_decay": -1},
            "fp8": {"fp8_format": "e4m3"},
            "parallel": {"sequence_parallel": True, "pipeline_model_parallel_layout": "E|x"},
            "resources": {"signal_delay_s": 7200},
        },
    )
    assert {fault.field for fault in check(recipe)} == {
        "batch.global_batch_size",
        "optimizer.weight_decay",
        "fp8.fp8_format",
        "parallel.sequence_parallel",
        "parallel.pipeline_model_parallel_layout",
        "resources.signal_delay_s",
    }


def test_rules_are_silent_about_fields_that_are_already_wrong(dense, changed):
    recipe = changed(dense, {"batch": {"micro_batch_size": 0, "global_batch_size": "many"}})
    assert [fault.field for fault in check(recipe)] == ["batch.micro_batch_size", "batch.global_batch_size"]


def test_rules_are_silent_where_they_saw_a_default(dense, changed):
    """The rule of min_lr would compare it with the default of lr, which nobody gave."""
    recipe = changed(dense, {"learning_rate": {"lr": "5e-3", "min_lr": 1e-3}})
    assert [fault.field for fault in check(recipe)] == ["learning_rate.lr"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Path("runs"), "not pathlib.PosixPath; try str(path)"),
        (np.int64(3), "not numpy.int64; try its .item()"),
        ("3", "not str"),
    ],
)
def test_types_of_libraries_are_named_with_what_python_has(dense, changed, value, said):
    field = {"checkpoint": {"save": value}} if isinstance(value, Path) else {"training": {"train_iters": value}}
    (fault,) = check(changed(dense, field))
    assert str(fault).endswith(said)


def test_a_name_fits_a_folder(dense):
    assert check(replace(dense, name="n" * 200)) == []
    (fault,) = check(replace(dense, name="n" * 201))
    assert str(fault) == "name has 201 characters, above 200"


def test_a_group_of_the_wrong_class_is_named(dense):
    (fault,) = check(replace(dense, parallel=dense.batch))
    assert str(fault) == "parallel must be a Parallel, not Batch"


def test_every_unbuilt_parameter_is_refused_by_name(dense, changed):
    """Each parameter with an unbuilt value yields its fault, whatever else that value breaks."""
    candidates = (True, False, 3, 5, 0.25, -0.25, "x", ("x",), {"x": 1})
    for parameter in parameters(Recipe):
        if parameter.facts.built is True:
            continue
        refused = [
            value
            for value in (*candidates, *_choices(parameter))
            if parameter.unbuilt(value)
            and f"{parameter.dotted}={value!r} {parameter.facts.refused or 'is not built yet'}"
            in "\n".join(map(str, check(changed(dense, {parameter.group: {parameter.name: value}}))))
        ]
        assert refused, f"no value of {parameter.dotted} is refused as not built"


def _choices(parameter):
    from megabatch.config.field_types import choices

    return [*choices(parameter.hint), ("all",), ("mla_up_proj",), (0.5,)]


def test_built_values_of_a_partly_built_parameter_pass(experts, changed):
    assert check(changed(experts, {"moe": {"moe_token_dispatcher_type": "allgather"}})) == []
    (fault,) = check(changed(experts, {"moe": {"moe_token_dispatcher_type": "alltoall_seq"}}))
    assert str(fault) == (
        "moe.moe_token_dispatcher_type='alltoall_seq' is gone from megatron-core (0.16); works: 'alltoall', "
        "'allgather', 'flex'"
    )


def test_rules_are_all_registered_once():
    assert len(set(RULES)) == len(RULES)


def test_an_empty_recipe_says_what_it_needs():
    fields = {fault.field for fault in check(Recipe(name="empty", task="pt"))}
    assert fields == {"data.dataset", "training.train_iters", "model.model"}
