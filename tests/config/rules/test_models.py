"""Made and given models, and settings of experts."""

from __future__ import annotations

import pytest

from megabatch.config.rules import models

FLEX = {"moe_token_dispatcher_type": "flex"}
EP4 = {"parallel": {"expert_model_parallel_size": 4}}
HALF = {"model": {"torch_dtype": "bfloat16"}}

CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        models.new_model_is_described,
        "dense",
        {"model": {"hidden_size": None}},
        {"model": {"ffn_hidden_size": None}},
        "model.hidden_size",
        ["model.hidden_size is missing"],
    ),
    (
        models.new_model_is_described,
        "given dense",
        {"model": {"model": None}},
        {},
        "model.model",
        ["model.model is missing", "hub name", "padded_vocab_size"],
    ),
    (
        models.new_model_is_described,
        "experts",
        {"moe": {"moe_router_topk": None}},
        {"moe": {"moe_ffn_hidden_size": None}},
        "moe.moe_router_topk",
        ["num_experts needs it"],
    ),
    (
        models.given_model_decides_its_shape,
        "given dense",
        {"model": {"num_layers": 3}},
        {"model": {"num_layers": 4}},
        "model.num_layers",
        ["the model's own 4", "config.json"],
    ),
    (
        models.given_model_decides_its_shape,
        "given experts",
        {"moe": {"moe_layer_freq": 2}},
        {"moe": {"moe_layer_freq": 1}},
        "moe.moe_layer_freq",
        ["[1, 1, 1, 1]"],
    ),
    (
        models.new_tokens_begin_at_the_model,
        "given dense",
        {"model": {"new_special_tokens": ["<call>"]}, "checkpoint": {"load": "/runs/first"}},
        {"model": {"new_special_tokens": ["<call>"]}},
        "checkpoint.load",
        ["has an embedding of its own", "megabatch-convert --to_hf"],
    ),
    (
        models.heads_divide,
        "dense",
        {"model": {"hidden_size": 60}},
        {"model": {"hidden_size": 60, "kv_channels": 8}},
        "model.hidden_size",
        ["num_attention_heads=8", "try 56 or 64"],
    ),
    (
        models.heads_divide,
        "dense",
        {"model": {"num_query_groups": 3}},
        {"model": {"num_query_groups": 2}},
        "model.num_attention_heads",
        ["num_query_groups=3", "try 9 or 6"],
    ),
    (
        models.heads_divide,
        "dense",
        {"model": {"kv_channels": 7}},
        {"model": {"kv_channels": 6}},
        "model.kv_channels",
        ["even", "try 8"],
    ),
    (
        models.heads_divide,
        "dense",
        {"model": {"group_query_attention": False}},
        {"model": {"group_query_attention": True}},
        "model.group_query_attention",
        ["num_query_groups=4"],
    ),
    (
        models.positions_suffice,
        "given dense",
        {"data": {"max_length": 256}},
        {"data": {"max_length": 128}},
        "data.max_length",
        ["max_position_embeddings=128", "try 128"],
    ),
    (
        models.positions_suffice,
        "given dense",
        {"data": {"max_length": 128}, "task": "rlhf", "rlhf": {"rlhf_type": "grpo"}},
        {"data": {"max_length": 127}, "task": "rlhf", "rlhf": {"rlhf_type": "grpo"}},
        "data.max_length",
        ["must leave room for a completion", "max_position_embeddings=128", "try 127"],
    ),
    (
        models.dense_models_take_no_moe,
        "dense",
        {"moe": {"moe_aux_loss_coeff": 0.1}},
        {"moe": {"moe_permute_fusion": True}},
        "moe.moe_aux_loss_coeff",
        ["llama has no experts", "0.0"],
    ),
    (
        models.moe_layers_are_listed,
        "experts",
        {"moe": {"moe_layer_freq": [1, 0, 1]}},
        {"moe": {"moe_layer_freq": [1, 0, 1, 0]}},
        "moe.moe_layer_freq",
        ["each of the model's 4 layers"],
    ),
    (
        models.router_is_consistent,
        "experts",
        {"moe": {"moe_router_topk": 9}},
        {"moe": {"moe_router_topk": 8}},
        "moe.moe_router_topk",
        ["num_experts=8"],
    ),
    (
        models.router_is_consistent,
        "experts",
        {"moe": {"moe_router_topk": 1}},
        {"moe": {"moe_router_topk": 1, "moe_router_pre_softmax": True}},
        "moe.moe_router_topk",
        ["moe_router_pre_softmax"],
    ),
    (
        models.router_is_consistent,
        "experts",
        {"moe": {"moe_router_num_groups": 2}},
        {"moe": {"moe_router_num_groups": 2, "moe_router_group_topk": 1}},
        "moe.moe_router_num_groups",
        ["moe_router_group_topk"],
    ),
    (
        models.balancing_is_consistent,
        "experts",
        {"moe": {"moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "none"}},
        {"moe": {"moe_aux_loss_coeff": 0.1}},
        "moe.moe_aux_loss_coeff",
        ["'none'", "try 0"],
    ),
    (
        models.balancing_is_consistent,
        "experts",
        {"moe": {"moe_pad_expert_input_to_capacity": True}},
        {"moe": {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.5}},
        "moe.moe_pad_expert_input_to_capacity",
        ["moe_expert_capacity_factor"],
    ),
    (
        models.balancing_is_consistent,
        "experts",
        {"moe": {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 4.5}},
        {"moe": {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 4}},
        "moe.moe_expert_capacity_factor",
        ["num_experts/moe_router_topk=4", "try 4"],
    ),
    (
        models.balancing_is_consistent,
        "experts",
        {
            "moe": {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.5},
            "parallel": {"tensor_model_parallel_size": 2},
        },
        {"moe": {"moe_expert_capacity_factor": 1.5}, "parallel": {"tensor_model_parallel_size": 2}},
        "moe.moe_pad_expert_input_to_capacity",
        ["tensor_model_parallel_size=1"],
    ),
    (
        models.balancing_is_consistent,
        "experts",
        {
            "moe": {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.5},
            "parallel": {"context_parallel_size": 2},
        },
        {"moe": {"moe_expert_capacity_factor": 1.5}, "parallel": {"context_parallel_size": 2}},
        "moe.moe_pad_expert_input_to_capacity",
        ["context_parallel_size=1"],
    ),
    (
        models.balancing_is_consistent,
        "experts",
        {"moe": {"moe_expert_capacity_factor": 1.5, "moe_router_load_balancing_type": "sinkhorn"}},
        {"moe": {"moe_expert_capacity_factor": 1.5, "moe_router_load_balancing_type": "aux_loss"}},
        "moe.moe_expert_capacity_factor",
        ["sinkhorn"],
    ),
    (
        models.deepep_can_dispatch,
        "experts",
        {"moe": {"moe_enable_deepep": True}},
        {"moe": {"moe_enable_deepep": True, **FLEX}, **EP4, **HALF},
        "moe.moe_enable_deepep",
        ["needs moe_token_dispatcher_type='flex'"],
    ),
    (
        models.deepep_can_dispatch,
        "experts",
        {"moe": FLEX, **EP4, **HALF, "resources": {"gpus_per_node": 0, "tasks_per_node": 8}},
        {"moe": FLEX, **EP4, **HALF},
        "moe.moe_token_dispatcher_type",
        ["is DeepEP's kernels, which run on GPUs", "gpus_per_node is 0", "try alltoall"],
    ),
    (
        models.deepep_can_dispatch,
        "experts",
        {"moe": FLEX, **EP4, "model": {"torch_dtype": "float32"}},
        {"moe": FLEX, **EP4, **HALF},
        "moe.moe_token_dispatcher_type",
        ["torch_dtype to be 'bfloat16'", "it is 'float32'"],
    ),
    (
        models.deepep_can_dispatch,
        "experts",
        {"moe": FLEX, **HALF, "parallel": {"expert_model_parallel_size": 1}},
        {"moe": FLEX, **EP4, **HALF},
        "moe.moe_token_dispatcher_type",
        ["which is 1, to be one of 2, 4, 8, 16"],
    ),
    (
        models.deepep_can_dispatch,
        "experts",
        {"moe": {**FLEX, "moe_deepep_num_sms": 21}, **EP4, **HALF},
        {"moe": {**FLEX, "moe_deepep_num_sms": 22}, **EP4, **HALF},
        "moe.moe_deepep_num_sms",
        ["must be even"],
    ),
    (
        models.deepep_can_dispatch,
        "experts",
        {"moe": {**FLEX, "moe_shared_expert_overlap": True}, **EP4, **HALF},
        {"moe": FLEX, **EP4, **HALF},
        "moe.moe_shared_expert_overlap",
        ["cannot be combined with moe_token_dispatcher_type='flex'"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(models.RULES)
