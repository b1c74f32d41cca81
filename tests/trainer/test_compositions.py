"""Compositions of parallel sizes, rows and tuning compute what one process computes; see `tests/matrix.py` for all."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
from composed import TOLERANCE, Composed, Deviation
from compositions import Composition, compositions, covering
from rank_server import RankServer

SIZES = ("tp", "pp", "vp", "cp", "dp", "ep", "etp")


def chosen() -> list[Composition]:
    """Every two properties together, where sizes are 1 or 2, and sizes of 4 by themselves."""
    halves = [one for one in compositions() if _largest(one) <= 2]
    quarters = [one for one in compositions() if one.world_size <= 4 and _largest(one) == 4]
    return [*covering(halves), *covering(quarters, together=1)]


def _largest(one: Composition) -> int:
    return max(getattr(one, size) for size in SIZES)


@pytest.fixture(scope="module")
def found(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Deviation]:
    composed = Composed(ranks, tmp_path_factory.mktemp("compositions"))
    return {name: one for world in composed.deviations(chosen()) for name, one in world.items()}


def test_the_rules_allow_every_size_and_kind() -> None:
    every = compositions()
    for size in ("tp", "pp", "cp", "dp", "ep", "etp"):
        assert {1, 2, 4, 8} <= {getattr(one, size) for one in every}, size
    of_three = [one for one in every if one.tp == one.pp == one.cp == 2]
    assert {(one.experts, one.packed, one.lora) for one in of_three} == set(product((False, True), repeat=3))


def test_losses_and_gradient_norms_are_those_of_one_process(found: Mapping[str, Deviation]) -> None:
    far = {name: one for name, one in found.items() if not one.largest <= TOLERANCE}
    assert not far
