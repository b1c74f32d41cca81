"""Which layers a run gets by its recipe and its model: one answer for rules, plans, defaults and the trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch import Recipe
from megabatch.config.layer_implementation import why_local
from megabatch.config.new_model import declared_shape
from megabatch.config.shared_prompts import why_local_layers

HALF: dict[str, Any] = {"model": {"torch_dtype": "bfloat16"}}
WHY: dict[str, tuple[dict[str, Any], str | None]] = {
    "asked for": ({**HALF, "kernels": {"transformer_impl": "local"}}, "transformer_impl='local'"),
    "on CPUs": ({**HALF, "resources": {"gpus_per_node": 0}}, "gpus_per_node=0"),
    "biases": ({**HALF, "tuner": {"tuner_type": "lora", "lora_bias": "all"}}, "lora_bias='all' trains biases"),
    "fp32": ({"model": {"torch_dtype": "float32"}}, "Transformer Engine has no attention of packed rows in fp32"),
    "none": (HALF, None),
}


@pytest.mark.parametrize("name", WHY)
def test_why_a_run_has_local_layers(name: str, dense: Recipe, changed: Any) -> None:
    changes, expected = WHY[name]
    recipe = changed(dense, changes)
    found = why_local(recipe, declared_shape(recipe), shares_prompts=False)
    assert found == expected or (found is not None and expected is not None and found.startswith(expected))


def test_biases_of_a_model_and_shared_prompts_need_them(dense: Recipe, changed: Any) -> None:
    recipe = changed(dense, HALF)
    shape = declared_shape(recipe)
    assert shape is not None
    found = why_local(recipe, replace(shape, mlp_bias=True), shares_prompts=False)
    assert found == "megatron-core's Transformer Engine layers lack some of this model's biases"
    assert why_local(recipe, None, shares_prompts=False) is None
    found = why_local(recipe, shape, shares_prompts=True)
    assert found is not None and found.startswith("share_prompts")


def test_a_default_that_shares_prompts_counts(dense: Recipe, changed: Any) -> None:
    recipe = changed(dense, {**HALF, "task": "rlhf", "tuner": {"tuner_type": "lora", "lora_dropout": 0.0}})
    found = why_local_layers(recipe, declared_shape(recipe))
    assert found is not None and found.startswith("share_prompts")
    full = changed(dense, {**HALF, "task": "rlhf"})
    assert why_local_layers(full, declared_shape(full)) is None
