"""The shape that a recipe declares for a new model."""

from __future__ import annotations

import pytest

from megabatch.config.moe import MoE
from megabatch.config.new_model import REQUIRED, declared_shape, moe_layers


def test_defaults_follow_from_what_is_given(dense, changed):
    bare = {"ffn_hidden_size": None, "num_query_groups": 1}
    shape = declared_shape(changed(dense, {"model": bare}), architecture="LlamaForCausalLM")
    assert (shape.architecture, shape.model_type) == ("LlamaForCausalLM", "llama")
    assert (shape.ffn_hidden_size, shape.kv_channels, shape.vocab_size) == (256, 8, 512)
    assert shape.max_position_embeddings == dense.data.max_length
    assert shape.num_experts is None and shape.moe_layers == () and shape.moe_ffn_hidden_size is None


@pytest.mark.parametrize(
    ("grouped", "groups", "expected"), [(None, 1, 8), (None, 2, 2), (True, 1, 1), (True, 4, 4), (False, 1, 8)]
)
def test_groups_count_only_with_grouped_attention(dense, changed, grouped, groups, expected):
    fields = {"group_query_attention": grouped, "num_query_groups": groups}
    assert declared_shape(changed(dense, {"model": fields})).num_query_groups == expected


def test_experts_take_the_dense_width_unless_they_have_their_own(experts, changed):
    assert declared_shape(experts).moe_ffn_hidden_size == 48
    assert declared_shape(changed(experts, {"moe": {"moe_ffn_hidden_size": None}})).moe_ffn_hidden_size == 96


@pytest.mark.parametrize("field", REQUIRED)
def test_nothing_is_declared_without_the_needed_fields(dense, changed, field):
    assert declared_shape(changed(dense, {"model": {field: None}})) is None


def test_an_existing_model_declares_nothing(dense, changed):
    assert declared_shape(changed(dense, {"model": {"model": "some/model"}})) is None


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [(None, (1, 1, 1, 1)), (1, (1, 1, 1, 1)), (2, (1, 0, 1, 0)), (3, (1, 0, 0, 1)), ([0, 1, 1, 0], (0, 1, 1, 0))],
)
def test_moe_layers(frequency, expected):
    assert moe_layers(MoE(num_experts=2, moe_layer_freq=frequency), 4) == tuple(map(bool, expected))
