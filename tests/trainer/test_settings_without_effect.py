"""What a run says of settings that change speed alone and have no effect in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from runs import recipe_on, with_fields

from megabatch import MoE, Optimizer, Precision, Recipe
from megabatch.config.declare import Parameter, parameters
from megabatch.entry.model import find_model
from megabatch.trainer.settings_without_effect import (
    CUDA,
    NEVER,
    TRANSFORMER_ENGINE,
    reason_without_effect,
    settings_of_others,
)

KNOWN: dict[str, Parameter] = {one.name: one for one in parameters(Recipe)}


@pytest.mark.parametrize("name", TRANSFORMER_ENGINE)
def test_local_layers_have_none_of_transformer_engines_kernels(name: str) -> None:
    found = reason_without_effect(KNOWN[name], why_local="transformer_impl='local'")
    assert found == "it is Transformer Engine's, and the run has local layers (transformer_impl='local')"
    assert reason_without_effect(KNOWN[name], why_local=None) is None


def test_every_name_is_that_of_a_parameter() -> None:
    assert {*TRANSFORMER_ENGINE, *CUDA, *NEVER} <= KNOWN.keys()
    assert not {*TRANSFORMER_ENGINE} & {*CUDA}


def test_settings_of_another_optimizer_precision_or_routing_are_named(tmp_path: Path) -> None:
    made = replace(
        recipe_on(tmp_path, "qwen3_moe"),
        optimizer=Optimizer(sgd_momentum=0.5, adam_beta1=0.8),
        precision=Precision(hysteresis=3),
        moe=MoE(num_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2, moe_token_drop_policy="position"),
    )
    shape = find_model(made).shape
    assert shape is not None
    assert dict(settings_of_others(made, shape)) == {
        "optimizer.sgd_momentum=0.5": "the optimizer is adam",
        "precision.hysteresis=3": "losses are scaled in float16, and the model's dtype is float32",
        "moe.moe_token_drop_policy='position'": "without moe_expert_capacity_factor no token is dropped",
    }
    read = with_fields(
        made,
        model={"torch_dtype": "float16"},
        optimizer={"optimizer": "sgd"},
        moe={"moe_expert_capacity_factor": 1.0},
    )
    assert dict(settings_of_others(read, shape)) == {"optimizer.adam_beta1=0.8": "the optimizer is sgd"}
