"""Parameters counted by formula against the sum over the converters' tables, for every published model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megabatch.converters.families import FAMILIES, family_of
from megabatch.plan.model_size import num_active_parameters, num_parameters
from megabatch.plan.published_models import KNOWN_MODELS


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_the_formula_counts_every_tensor(name: str) -> None:
    family = family_of(KNOWN_MODELS[name])
    shape = replace(family.shape(KNOWN_MODELS[name]), num_layers=3, moe_layers=(True,) * 3)
    shape = shape if shape.num_experts else replace(shape, moe_layers=())
    assert num_parameters(shape) == sum(math.prod(size) for size in family.hf_tensors(shape).values())


def test_tied_embeddings_count_once() -> None:
    family = FAMILIES["qwen3"]
    shape = replace(family.shape(KNOWN_MODELS["Qwen/Qwen3-8B"]), untie_embeddings_and_output_weights=False)
    assert num_parameters(shape) == sum(math.prod(size) for size in family.hf_tensors(shape).values())


def test_published_sizes() -> None:
    """30.5 B in total and 3.3 B active, as the model card says."""
    config = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"]
    shape = family_of(config).shape(config)
    assert num_parameters(shape) == 30_532_122_624
    assert 3.3e9 < num_active_parameters(shape) < 3.4e9
