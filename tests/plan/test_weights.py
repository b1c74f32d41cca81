"""Every tensor of every family against the converters' mapping tables: how many, how large, cut how."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from megabatch.converters.families import FAMILIES, family_of
from megabatch.converters.mapping import Mapped
from megabatch.converters.shards import shard_shape
from megabatch.plan import weights
from megabatch.plan.model_size import num_active_parameters, num_parameters
from megabatch.plan.weights import Weight

sys.path.insert(0, str(Path(__file__).parent))

from small_models import MODELS, config_of, shape_of


def _rank_elements(found: Iterable[tuple[Weight, int]], *, tp: int, ep: int, etp: int) -> int:
    return sum(w.shard(tp=tp, etp=etp) * (w.experts // ep if w.experts else 1) * layers for w, layers in found)


def _table_elements(table: Iterable[Mapped], *, tp: int, ep: int, etp: int, experts: int, vocab: int) -> int:
    """The same from the mapping table: experts 0 … experts / ep - 1 lie on the first rank."""
    total = 0
    for mapped in table:
        if mapped.expert is None or mapped.expert < experts // ep:
            ways = tp if mapped.expert is None else etp
            total += math.prod(shard_shape(mapped, tp_size=ways, padded_vocab=vocab))
    return total


def test_every_family_is_here() -> None:
    inside = ("_vl", "llava", "mistral3", "gemma3")  # what stands around another family's decoder
    named = {family_of(config_of(name)).name for name in MODELS}
    assert {name for name in FAMILIES if not any(part in name for part in inside)} <= named


@pytest.mark.parametrize(
    ("name", "tp", "ep", "etp"),
    [
        (name, *sizes)
        for name in MODELS
        for sizes in [(1, 1, 1), (2, 1, 1), (2, 4, 1), (1, 2, 2)]
        if sizes[1:] == (1, 1) or shape_of(name).num_experts
    ],
)
def test_each_rank_holds_what_the_mapping_table_gives_it(name: str, *, tp: int, ep: int, etp: int) -> None:
    shape = shape_of(name)
    table = FAMILIES[shape.model_type].tensors(shape)
    experts = shape.num_experts or 1
    expected = _table_elements(table, tp=tp, ep=ep, etp=etp, experts=experts, vocab=60)
    assert _rank_elements(weights.model(shape), tp=tp, ep=ep, etp=etp) == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_every_tensor_on_disk(name: str) -> None:
    shape = shape_of(name)
    on_disk = FAMILIES[shape.model_type].hf_tensors(shape).values()
    assert num_parameters(shape) == sum(math.prod(size) for size in on_disk)


def test_a_vocabulary_is_filled_up() -> None:
    embedding = weights.embedding(shape_of("llama"))
    assert [embedding.shard(tp=tp, etp=1) for tp in (1, 8)] == [60 * 24, 8 * 24]


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    shape = shape_of("qwen3-moe")
    assert num_parameters(shape) - num_active_parameters(shape) == 2 * 2 * 3 * 24 * 12  # layers, experts, an expert
