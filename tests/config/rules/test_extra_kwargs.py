"""Further fields for megatron-core that would contradict what the rest of the recipe says."""

from __future__ import annotations

import dataclasses

import pytest

from megabatch.config.declare import parameters
from megabatch.config.recipe import Recipe
from megabatch.config.rules import extra_kwargs

CASES = [
    ("moe_router_load_balancing_type", "seq_aux_loss", "moe.moe_router_load_balancing_type sets; give it there"),
    ("tensor_model_parallel_size", 2, "parallel.tensor_model_parallel_size sets"),
    ("moe_token_dispatcher_type", "flex", "moe.moe_token_dispatcher_type sets"),
    ("virtual_pipeline_model_parallel_size", 2, "parallel.num_virtual_stages_per_pipeline_rank sets"),
    ("attention_dropout", 0.1, "model.attention_dropout sets"),
    ("params_dtype", "bfloat16", "model.torch_dtype sets"),
    ("calculate_per_token_loss", True, "training.calculate_per_token_loss sets"),
    ("variable_seq_lengths", False, "the trainer sets; leave it out"),
    ("cuda_graph_impl", "local", "replays layers from a CUDA graph"),
    ("overlap_moe_expert_parallel_comm", True, "runs layers in parts (schedule plans)"),
    ("moe_flex_dispatcher_backend", "hybridep", "moe.moe_flex_dispatcher_backend sets"),
    ("moe_hybridep_num_sms", 16, "belongs to moe_flex_dispatcher_backend=hybridep, which is refused"),
    ("softmax_scale", 1.0, "the model's family determines; leave it out"),
]


@pytest.mark.parametrize(("name", "value", "words"), CASES)
def test_rule(prove, name, value, words):
    prove(
        extra_kwargs.extra_fields_are_not_set_elsewhere,
        "experts",
        {"training": {"megatron_extra_kwargs": {"barrier_with_L1_time": False, name: value}}},
        {"training": {"megatron_extra_kwargs": {"barrier_with_L1_time": False}}},
        "training.megatron_extra_kwargs",
        [f"names {name}, which {words}"],
    )


def test_every_owner_is_a_parameter():
    named = {parameter.dotted for parameter in parameters(Recipe)}
    assert set(extra_kwargs._UNDER_OTHER_NAMES.values()) <= named
    assert all(extra_kwargs.owner_of(parameter.name) for parameter in parameters(Recipe))


def test_every_field_named_here_is_one_of_megatron_core():
    config = pytest.importorskip("megatron.core.transformer.transformer_config").TransformerConfig
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(extra_kwargs._REFUSED) | extra_kwargs._OF_THE_TRAINER <= fields
