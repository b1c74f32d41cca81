"""Names of runs: short, stable, distinct, and harmless as a folder whatever the values are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.sweep.names import in_order, labels, number_text, run_names, value_text

TP, PP, EP = (f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ({EP: 4, TP: 4, PP: 2}, "tp4-pp2-ep4"),
        ({"training.seed": 2, "learning_rate.lr": 1e-5}, "lr1e-5-seed2"),
        ({"grpo.loss_type": "dr_grpo", "grpo.beta": 0.04, "training.seed": 1}, "loss_dr_grpo-beta0.04-seed1"),
        ({TP: 2, "parallel.sequence_parallel": True}, "tp2-sp"),
        ({"parallel.sequence_parallel": False}, "no_sp"),
        ({"optimizer.adam_beta1": 0.9}, "adam_beta1_0.9"),
        ({"grpo.scale_rewards": None}, "scale_rewards_unset"),
        ({"dpo.beta": 0.1, "kto.beta": 0.2}, "dpo.beta0.1-kto.beta0.2"),
        ({}, "base"),
    ],
)
def test_names_read_like_the_point(point: dict[str, Any], name: str) -> None:
    assert run_names([point]) == [name]


@pytest.mark.parametrize(
    ("number", "text"),
    [(1e-5, "1e-5"), (0.0005, "5e-4"), (0.04, "0.04"), (16, "16"), (1.0, "1"), (2.5e-7, "2.5e-7"), (1e16, "1e16")],
)
def test_numbers_are_as_short_as_they_can_be(number: float, text: str) -> None:
    assert number_text(number) == text and float(text) == number


@given(st.floats(min_value=0, allow_infinity=False))
def test_a_number_is_told_exactly(number: float) -> None:
    assert float(number_text(number)) == number


def test_a_name_does_not_depend_on_the_order_or_on_other_points() -> None:
    points = [{TP: 2, "training.seed": seed} for seed in (1, 2)]
    assert run_names(points)[0] == run_names(points[:1])[0] == run_names([dict(reversed(points[0].items()))])[0]


VALUES = st.one_of(st.text(min_size=1), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())


@given(st.lists(VALUES, min_size=1, max_size=8, unique_by=lambda value: (isinstance(value, bool), value)))
def test_any_values_give_distinct_names_that_are_safe(values: list[Any]) -> None:
    names = run_names([{"data.system": value} for value in values])
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and len(name) <= 150


HOSTILE = ["$(rm -rf ~)", "`id`", "a b", "../../etc", "it's", "\n", "漢字", "-rf", "", "x" * 500]


@pytest.mark.parametrize("value", HOSTILE)
def test_text_that_a_name_cannot_hold_carries_a_hash(value: str) -> None:
    assert re.fullmatch(r"([A-Za-z0-9_]{1,32}\.)?[0-9a-f]{8}", value_text(value))


def test_values_that_look_alike_are_told_apart() -> None:
    assert len({value_text(value) for value in ("a b", "a_b", "a  b", "/x/a b", ("a", "b"), "a-b")}) == 6


def test_labels_that_would_be_the_same_are_spelled_out() -> None:
    assert labels(["dpo.loss_type", "training.seed"]) == {"dpo.loss_type": "loss", "training.seed": "seed"}
    assert labels(["dpo.loss_type", "kto.loss_type"]) == {name: name for name in ("dpo.loss_type", "kto.loss_type")}


def test_seeds_come_last() -> None:
    assert in_order(["training.seed", "tuner.lora_dropout", TP]) == [TP, "tuner.lora_dropout", "training.seed"]
