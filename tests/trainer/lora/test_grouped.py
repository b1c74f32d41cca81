"""Adapters of experts that are one layer give the numbers of those of experts on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import TP2_SP, adapter_of, run_of
from grouped_experts import train_grouped
from rank_server import RankServer
from runs import curve, train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_etp2": (2, {**TP2_SP, "expert_tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def alone(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_of(tmp_path_factory.mktemp("grouped"), "alone", "qwen3_moe", 1, {})
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_one_layer_train_the_adapters_of_experts_alone(layout: str, ranks: RankServer, alone: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    run = run_of(alone.parent, layout, "qwen3_moe", world_size, {"parallel": parallel})
    assert set(ranks.run(train_grouped, world_size=world_size, run_dir=str(run))) == {0}
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(run), curve(alone), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-5)), f"step {step}"
    found, expected = adapter_of(run), adapter_of(alone)
    assert found.keys() == expected.keys()
    assert any("experts" in name for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
