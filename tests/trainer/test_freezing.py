"""Frozen parameters stay as they are, and have no gradient and no optimizer state, at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, recipe, train, write_run
from safetensors.torch import load_file

from megabatch.converters.torch_dist.folder import TorchDistFolder

FROZEN = {
    "freeze_parameters": ["embedding.", "decoder.layers.0.", "model.layers.1."],
    "freeze_parameters_regex": "router",
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2": ("qwen3_moe", 2, {}),
    "dp2_plain": ("qwen3_moe", 2, {"parallel": {"use_distributed_optimizer": False}}),
    "recompute": ("qwen3_moe", 1, {"recompute": FULL}),
    "cp2": ("qwen3_moe", 2, {"parallel": {"context_parallel_size": 2}}),
    "tp2_sp": ("qwen3_moe", 2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    # the first stage has nothing to train
    "pp2": ("qwen3_moe", 2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "pp2_vpp2": ("qwen3_moe", 2, {"parallel": {"pipeline_model_parallel_size": 2,
                                               "num_virtual_stages_per_pipeline_rank": 2}}),
    "tied_pp2": ("qwen2", 2, {"parallel": {"pipeline_model_parallel_size": 2}}),
}  # fmt: skip


def run_of(folder: Path, name: str, model: str, world_size: int, groups: dict[str, Any]) -> Path:
    tuner = FROZEN if model == "qwen3_moe" else {**FROZEN, "freeze_parameters_regex": None}
    made = recipe(folder, model, tuner=tuner, **groups, resources={"tasks_per_node": world_size})
    return write_run(made, folder / name)


@pytest.fixture(scope="module")
def references(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("freezing")
    runs = {model: run_of(folder, model, model, 1, {}) for model in ("qwen3_moe", "qwen2")}
    for run in runs.values():
        assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return runs


def test_frozen_parameters_stay_and_the_rest_learns(
    ranks: RankServer, references: dict[str, Path], tmp_path: Path
) -> None:
    trained = references["qwen3_moe"]
    untouched = run_of(trained.parent, "untouched", "qwen3_moe", 1, {"learning_rate": {"lr": 1e-30, "min_lr": 0.0}})
    ranks.run(train, world_size=1, run_dir=str(untouched))
    before, after = (load_file(run / "checkpoints/step_00000004/hf/model.safetensors") for run in (untouched, trained))
    frozen = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
    wanted = {n for n in before if "embed_tokens" in n or ".layers.0." in n or ".layers.1." in n or "mlp.gate." in n}
    assert frozen == wanted


def test_a_checkpoint_has_optimizer_state_of_what_is_trained_alone(references: dict[str, Path]) -> None:
    folder = TorchDistFolder(references["qwen2"] / "checkpoints/step_00000004/mcore")
    state = [key for key in folder.entries if key.startswith("optimizer.state.exp_avg.")]
    assert state and not any("embedding" in key for key in state)
    assert any("embedding" in key for key in folder.entries), "the model itself is whole"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, references: dict[str, Path]) -> None:
    model, world_size, groups = LAYOUTS[layout]
    run = run_of(references[model].parent, layout, model, world_size, groups)
    assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {0}
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(run), curve(references[model]), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-5)), f"step {step}"


def test_a_run_with_frozen_parameters_goes_on(ranks: RankServer, references: dict[str, Path]) -> None:
    folder = references["qwen3_moe"].parent
    cut = run_of(folder, "cut", "qwen3_moe", 2, {})
    ranks.run(train, world_size=2, run_dir=str(cut), stop_after=2)
    ranks.run(train, world_size=2, run_dir=str(cut))
    for (_, loss, norm), (_, its_loss, its_norm) in zip(curve(cut), curve(references["qwen3_moe"]), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-5))
