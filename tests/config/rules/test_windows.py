"""Attention windows of new models."""

from __future__ import annotations

import pytest

from megabatch.config.rules import windows
from megabatch.config.windows import declared_window
from megabatch.converters.families import FAMILIES, family_named
from megabatch.trainable import BUILT

QWEN = {"model_type": "qwen3"}

CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        windows.window_has_a_length,
        "dense",
        {"model": {**QWEN, "window_size": "128,1"}},
        {"model": {**QWEN, "window_size": "127, 0"}},
        "model.window_size",
        ["the earlier tokens that a token sees", "try 127,0"],
    ),
    (
        windows.window_has_a_length,
        "dense",
        {"model": {**QWEN, "window_attn_skip_freq": 2}},
        {"model": {**QWEN, "window_attn_skip_freq": 2, "window_size": "4,0"}},
        "model.window_attn_skip_freq",
        ["needs window_size"],
    ),
    (
        windows.window_has_a_length,
        "dense",
        {"model": {**QWEN, "window_attn_skip_freq": [1, 0], "window_size": "4,0"}},
        {"model": {**QWEN, "window_attn_skip_freq": [1, 0, 1, 0], "window_size": "4,0"}},
        "model.window_attn_skip_freq",
        ["each of the model's 4 layers"],
    ),
    (
        windows.window_has_a_length,
        "dense",
        {"model": {**QWEN, "window_attn_skip_freq": 1, "window_size": "4,0"}},
        {"model": {**QWEN, "window_attn_skip_freq": 4, "window_size": "4,0"}},
        "model.window_attn_skip_freq",
        ["at least 2"],
    ),
    (
        windows.window_is_the_familys,
        "dense",
        {"model": {"window_size": "4,0"}},
        {"model": {**QWEN, "window_size": "4,0"}},
        "model.window_size",
        ["is not for llama"],
    ),
    (
        windows.window_is_the_familys,
        "dense",
        {"model": {"model_type": "mistral", "window_size": "4,0", "window_attn_skip_freq": 2}},
        {"model": {"model_type": "mistral", "window_size": "4,0"}},
        "model.window_attn_skip_freq",
        ["every layer has the window"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(windows.RULES)


@pytest.mark.parametrize("model_type", BUILT)
def test_families_keep_a_declared_window_or_are_refused_one(experts, changed, model_type):
    """Through the family's config.json and back; one that would lose the window is not offered it."""
    from megabatch.config.new_model import declared_shape

    skips = [None, 2] if windows.FAMILIES.get(model_type) else [None]
    for skip in skips:
        model = {"model_type": model_type, "window_size": "7,0", "window_attn_skip_freq": skip}
        made = changed(experts, {"model": {**model, "max_position_embeddings": 256}})
        declared = declared_shape(made)
        family = family_named(model_type)
        read = family.shape(family.hf_config(declared))
        kept = (read.sliding_window, read.window_layers) == declared_window(made.model, 4)
        assert kept == (model_type in windows.FAMILIES)
    assert model_type in FAMILIES


def test_every_nth_layer_sees_everything(dense, changed):
    model = changed(dense, {"model": {"window_size": "7,0", "window_attn_skip_freq": 2}}).model
    assert declared_window(model, 4) == (8, (True, False, True, False))
