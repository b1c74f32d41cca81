"""Preferences, reward models and distillation are those of transformers' models in fp64, however they are laid out;
`tests/matrix.py --objectives` compares every composition."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from compositions import covering
from objective_runs import OBJECTIVES, every
from objectives_compared import TOLERANCE, Apart, Compared
from rank_server import RankServer


@pytest.fixture(scope="module")
def compared(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return Compared(ranks, tmp_path_factory.mktemp("objectives"))


@pytest.fixture(scope="module")
def found(compared: Compared) -> Mapping[str, Apart]:
    """Of every two properties together."""
    return {name: one for world in compared.deviations(covering(every())) for name, one in world.items()}


def test_losses_gradients_and_metrics_are_those_of_fp64(found: Mapping[str, Apart]) -> None:
    far = {name: one for name, one in found.items() if not one.largest <= TOLERANCE}
    assert not far
    assert {name.partition("-")[0] for name in found} == set(OBJECTIVES)


def test_the_samples_show_what_the_losses_have(compared: Compared, found: Mapping[str, Apart]) -> None:
    """Policies that are not their references, of which some are farther from mismatched answers than others."""
    metrics = {kind: one.metrics for kind, one in compared.expected.items()}
    assert any(one["kl"] > 0.1 for kind, one in metrics.items() if kind.objective == "kto")
    for kind, one in metrics.items():
        if "rewards/margins" in one:
            assert abs(one["rewards/margins"]) > 0.01, kind
