"""The trainer's contracts, by a task with pairs, a reference and steps of its own: equal at every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_run


def train_preference(run_dir: str, stop_after: int | None = None) -> int:
    """Trains one rank with this task in the place of sft."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    import preference

    from megabatch.trainer.tasks import table

    table.OPENERS = {"sft": preference.parts}
    return train(run_dir, stop_after)


GROUPS: dict[str, Any] = {
    "learning_rate": {"lr": 0.005, "min_lr": 0.005},
    "optimizer": {"adam_eps": 1e-3, "weight_decay": 0.0},
    "checkpoint": {"no_save_optim": True},
}
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "dp2": (2, {}),  # and 3 pairs to evaluate on: a micro-batch is without samples
    "micro4": (1, {"batch": {"micro_batch_size": 4, "global_batch_size": 8}}),
    "tp2_sp": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "pp2_vpp2": (2, {"parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}}),
    "dp2_overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}}),
    "cp2_micro4": (2, {"parallel": {"context_parallel_size": 2},
                       "batch": {"micro_batch_size": 4, "global_batch_size": 8}}),
    "ep2": (2, {"parallel": {"expert_model_parallel_size": 2}}),
}  # fmt: skip


def _run(ranks: RankServer, folder: Path, name: str, model: str, world_size: int, groups: dict[str, Any]) -> Path:
    made = recipe(folder, model, **{**GROUPS, **groups, "resources": {"tasks_per_node": world_size}})
    run = write_run(made, folder / name)
    assert set(ranks.run(train_preference, world_size=world_size, run_dir=str(run))) == {0}
    return run


@pytest.fixture(scope="module")
def references(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("preference")
    return {model: _run(ranks, folder, model, model, 1, {}) for model in ("qwen2", "qwen3_moe")}


def test_the_first_loss_is_that_of_equal_models(references: dict[str, Path]) -> None:
    for run in references.values():
        first, *_, last = metrics(run)
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert (first["loss_count"], first["margin"], first["rounds"]) == (8, pytest.approx(0, abs=1e-6), 1)
        assert abs(last["margin"]) > 1e-3
        start, *_, end = metrics(run, "eval")
        assert start["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert start["eval_margin_count"] == 3
        assert abs(end["eval_margin"]) > 1e-3
        assert end["eval_reference"] == start["eval_reference"] < 0, "the reference stays as it is"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, references: dict[str, Path]) -> None:
    model = "qwen3_moe" if layout == "ep2" else "qwen2"
    world_size, groups = LAYOUTS[layout]
    run = _run(ranks, references[model].parent, layout, model, world_size, groups)
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(run, kind), metrics(references[model], kind), strict=True):
            for name in expected.keys() & {"loss", "margin", "reference", "grad_norm", "eval_loss", "eval_margin"}:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), (kind, found["step"], name)
            for name in expected.keys() & {"loss_count", "eval_loss_count", "samples", "tokens", "rounds"}:
                assert found[name] == expected[name], (kind, found["step"], name)


def test_a_source_goes_on_from_its_own_cursor(ranks: RankServer, references: dict[str, Path], tmp_path: Path) -> None:
    groups = {**GROUPS, "checkpoint": {"no_save_optim": False}}
    run = write_run(recipe(references["qwen2"].parent, "qwen2", **groups), tmp_path / "cut")
    assert ranks.run(train_preference, world_size=1, run_dir=str(run), stop_after=2) == [75]
    assert ranks.run(train_preference, world_size=1, run_dir=str(run)) == [0]
    assert curve(run) == curve(references["qwen2"])
    assert [line["rounds"] for line in metrics(run)] == [1, 2, 3, 4]
