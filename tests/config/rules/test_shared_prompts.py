"""Where answers share their prompt by default, and why they do not elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from megabatch import Recipe
from megabatch.config.new_model import declared_shape
from megabatch.config.shared_prompts import (
    answers_in_a_row,
    inferred_answers_in_a_row,
    infers_alone,
    shares_prompts,
    why_not,
)

HALF: dict[str, Any] = {"torch_dtype": "bfloat16"}
OURS: dict[str, Any] = {"task": "rlhf", "kernels": {"transformer_impl": "local"}}
GRPO: dict[str, Any] = {"rlhf": {"rlhf_type": "grpo"}, "batch": {"micro_batch_size": 12}}
WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "task": ("dense", {"rlhf": {"rlhf_type": "kto"}}, "it is for dpo, rm, reranker, grpo"),
    "layers": ("dense", {"kernels": {}, "model": HALF}, "transformer_impl='transformer_engine' has no attention"),
    "padding": ("dense", {"data": {"padding_free": False}}, "padding_free=False makes"),
    "dropout": ("dense", {"model": {"hidden_dropout": 0.1}}, "hidden_dropout=0.1 drops"),
    "adapters": ("dense", {"tuner": {"tuner_type": "lora"}}, "lora_dropout=0.05 drops"),
    "balance": ("experts", {"moe": {"moe_aux_loss_coeff": 0.01}}, "moe_aux_loss_coeff=0.01 counts"),
    "capacity": ("experts", {"moe": {"moe_expert_capacity_factor": 2.0}}, "moe_expert_capacity_factor=2 counts"),
    "bnpo": ("dense", {**GRPO, "grpo": {"loss_type": "bnpo"}}, "loss_type='bnpo' depends on"),
    "few by few": (
        "dense",
        {"rlhf": {"rlhf_type": "grpo"}, "grpo": {"infer_batch_size": 9}},
        "micro_batch_size=1 and num_generations=8 have no",
    ),
    "one by one": ("dense", {"rlhf": {"rlhf_type": "grpo"}}, "micro_batch_size=1 and num_generations=8 have no"),
}


@pytest.fixture
def made(dense: Recipe, experts: Recipe, changed: Any) -> Any:
    def recipe_and_shape(base: str, changes: dict[str, Any]) -> tuple[Recipe, Any]:
        recipe = changed({"dense": dense, "experts": experts}[base], {**OURS, **changes})
        return recipe, declared_shape(recipe)

    return recipe_and_shape


@pytest.mark.parametrize("name", WHOLE)
def test_why_an_answer_has_its_prompt_for_itself(name: str, made: Any) -> None:
    base, changes, reason = WHOLE[name]
    recipe, shape = made(base, changes)
    found = why_not(recipe, shape)
    assert found is not None and found.startswith(reason)
    assert not shares_prompts(recipe, shape)


def test_what_changes_no_number_is_the_default(made: Any) -> None:
    for base, changes in (
        ("dense", {}),
        ("dense", {"rlhf": {"rlhf_type": "rm"}}),
        ("dense", {"kernels": {}, "tuner": {"tuner_type": "lora", "lora_dropout": 0.0}}),
        ("experts", {"moe": {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "none"}}),
        ("dense", GRPO),
    ):
        recipe, shape = made(base, changes)
        assert why_not(recipe, shape) is None and shares_prompts(recipe, shape)
    assert answers_in_a_row(recipe) == 4
    assert inferred_answers_in_a_row(recipe) == 4
    recipe, shape = made("dense", {"rlhf": {"rlhf_type": "grpo"}, "grpo": {"infer_batch_size": 16}})
    assert shares_prompts(recipe, shape)
    assert (answers_in_a_row(recipe), inferred_answers_in_a_row(recipe)) == (1, 8)
    recipe, shape = made("dense", {"rlhf": {"share_prompts": False}})
    assert not shares_prompts(recipe, shape)


@pytest.mark.parametrize(
    ("grpo", "more", "found"),
    [
        ({"beta": 0.0}, {}, False),
        ({"beta": 0.1}, {}, True),
        ({"beta": 0.0, "steps_per_generation": 2}, {}, True),
        ({"beta": 0.0, "num_iterations": 2}, {}, False),
        ({"beta": 0.0, "num_iterations": 2}, {"model": {"hidden_dropout": 0.1}}, True),
        ({"beta": 0.0, "router_replay_mode": "R2"}, {}, True),
        ({"beta": 0.0, "log_rollout_offpolicy_metrics": True}, {}, True),
        ({"beta": 0.0}, {"gkd": {"teacher_model": "x/y"}}, True),
        ({"beta": 0.0}, {"gkd": {"teacher_model_server": "http://h:1"}}, False),
        ({"beta": 0.1}, {"rlhf": {"rlhf_type": "grpo", "ref_model_server": "http://h:1"}}, False),
    ],
)
def test_whether_passes_only_compute_log_probabilities(
    grpo: dict[str, Any], more: dict[str, Any], found: bool, made: Any
) -> None:
    recipe, _ = made("dense", {"rlhf": {"rlhf_type": "grpo"}, "grpo": grpo, **more})
    assert infers_alone(recipe) is found
