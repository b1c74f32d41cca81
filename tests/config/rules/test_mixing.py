"""A probability for each dataset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megabatch import Batch, Data, Model, Recipe, Resources, Training
from megabatch.config.rules.mixing import each_dataset_has_a_probability

RECIPE = Recipe(
    name="x",
    task="sft",
    model=Model(model="m"),
    data=Data(dataset=["a.jsonl", "b.jsonl"]),
    batch=Batch(micro_batch_size=1, global_batch_size=1),
    training=Training(train_iters=1),
    resources=Resources(nodes=1, gpus_per_node=1, time="1:00:00"),
)


def faults(**fields: Any) -> list[str]:
    recipe = replace(RECIPE, data=replace(RECIPE.data, **fields))
    return list(map(str, each_dataset_has_a_probability(recipe, None, None)))


def test_good_mixtures() -> None:
    assert not faults() and not faults(interleave_prob=[0.25, 0.75])
    assert not faults(interleave_prob=[0.3, 0.7], stopping_strategy="all_exhausted")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"interleave_prob": [1.0]}, "has 1 probabilities, and data.dataset 2: give one for each"),
        ({"interleave_prob": [0.0, 1.0]}, "must be probabilities above 0; leave a dataset out that is never drawn"),
        ({"interleave_prob": [3.0, 1.0]}, "must be probabilities above 0"),
        ({"interleave_prob": [0.6, 0.6]}, "must add up to 1, not 1.2; try [0.5, 0.5]"),
        ({"stopping_strategy": "all_exhausted"}, "has no effect without interleave_prob"),
    ],
)
def test_anything_else_is_refused(fields: dict[str, Any], said: str) -> None:
    [fault] = faults(**fields)
    assert said in fault, fault
