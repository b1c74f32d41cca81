"""Numbers of rotary embeddings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megabatch.config.rules import rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def case(broken: dict, right: dict | None, *words: str):
    changes = {"model": {"rope_scaling": broken}}, {"model": {"rope_scaling": right}}
    return rope.rope_scaling_is_complete, "dense", *changes, "model.rope_scaling", list(words)


CASES = [
    case({"a": 1}, None, "needs rope_type, one of default, linear, llama3"),
    case({"type": "yarn", "factor": 2.0}, {}, "needs rope_type, one of default"),
    case({"rope_type": "linear"}, {"rope_type": "linear", "factor": 2}, "needs a positive number factor", "None"),
    case({"type": "linear", "factor": "2"}, {"type": "linear", "factor": 2.5}, "factor, which is '2'"),
    case(LLAMA3 | {"high_freq_factor": 0}, LLAMA3, "a positive number high_freq_factor, which is 0"),
    case(LLAMA3 | {"fator": 4}, LLAMA3, "has fator, which rope_type llama3 does not read"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[2]["model"]["rope_scaling"])[:40])
def test_rule(prove, case):
    prove(*case)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(rope.RULES)


def test_a_given_model_has_what_its_kind_needs_and_may_have_more(dense, dense_shape, changed):
    given = changed(dense, {"model": {"model": "folder"}})

    def faults(scaling: dict) -> list[str]:
        shape = replace(dense_shape, rope_scaling=scaling)
        return [fault.rule for fault in rope.rope_scaling_is_complete(given, shape, None)]

    assert faults({"rope_type": "linear", "mystery": 1}) == [
        "of rope_type linear needs a positive number factor, which is None"
    ]
    assert faults(LLAMA3 | {"mystery": 1}) == []
    assert faults({"rope_type": "yarn", "factor": 4.0}) == [], "the trainer's own list says that it is not built"
