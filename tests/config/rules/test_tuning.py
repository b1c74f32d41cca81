"""What is trained: parameters of LoRA and of freezing."""

from __future__ import annotations

import pytest

from megabatch.config.rules import tuning

TUNED = {"tuner_type": "lora"}
LORA = {"tuner": TUNED}
CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        tuning.each_kind_has_its_own_parameters,
        "dense",
        {"tuner": {"lora_rank": 16}},
        {"tuner": {"lora_rank": 16, "tuner_type": "lora"}},
        "tuner.lora_rank",
        ["needs tuner_type='lora', which is 'full'"],
    ),
    (
        tuning.each_kind_has_its_own_parameters,
        "dense",
        {"tuner": {"freeze_parameters": ["embedding."], "tuner_type": "lora"}},
        {"tuner": {"freeze_parameters": ["embedding."]}},
        "tuner.freeze_parameters",
        ["needs tuner_type='full', which is 'lora'"],
    ),
    (
        tuning.each_kind_has_its_own_parameters,
        "dense",
        {"bridge": {"merge_lora": True}},
        {"bridge": {"merge_lora": False}},
        "bridge.merge_lora",
        ["needs tuner_type='lora'"],
    ),
    (
        tuning.one_adapter_to_start_from,
        "dense",
        {**LORA, "bridge": {"adapters": ["a", "b"]}},
        {**LORA, "bridge": {"adapters": ["a"]}},
        "bridge.adapters",
        ["must be one adapter", "merge the others first"],
    ),
    (
        tuning.one_adapter_to_start_from,
        "dense",
        {"tuner": {"tuner_type": "lora", "adapter_load": "b"}, "bridge": {"adapters": ["a"]}},
        {"tuner": {"tuner_type": "lora", "adapter_load": "b"}},
        "bridge.adapters",
        ["and tuner.adapter_load='b' both begin the run"],
    ),
    (
        tuning.tied_embeddings_are_one_tensor,
        "dense",
        {
            "tuner": {**TUNED, "target_modules": ["output_layer"]},
            "model": {"untie_embeddings_and_output_weights": False},
        },
        {
            "tuner": {**TUNED, "target_modules": ["all-embedding"]},
            "model": {"untie_embeddings_and_output_weights": False},
        },
        "tuner.target_modules",
        ["has 'output_layer'", "output layer is its embedding", "all-embedding"],
    ),
    (
        tuning.tied_embeddings_are_one_tensor,
        "dense",
        {"tuner": {**TUNED, "modules_to_save": ["lm_head"]}, "model": {"untie_embeddings_and_output_weights": False}},
        {"tuner": TUNED, "model": {"untie_embeddings_and_output_weights": False}},
        "tuner.modules_to_save",
        ["has 'lm_head'", "PEFT would train a copy"],
    ),
    (
        tuning.adapters_have_the_dtype_of_the_model,
        "dense",
        {"tuner": {**TUNED, "lora_dtype": "float32"}, "model": {"torch_dtype": "bfloat16"}},
        {"tuner": {**TUNED, "lora_dtype": "bfloat16"}, "model": {"torch_dtype": "bfloat16"}},
        "tuner.lora_dtype",
        ["must be the model's torch_dtype, 'bfloat16'"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(tuning.RULES)
