"""Tensor parallelism above the number of query groups: checkpoints mean the same model at every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run
from safetensors.torch import load_file

from megabatch import Model
from megabatch.converters import ConversionRequest, convert

STEPS, STOP = 4, 2
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
}


def _run(ranks: RankServer, folder: Path, name: str, layout: str, *, stop: int | None = None, **groups: Any) -> Path:
    world_size, parallel = LAYOUTS[layout]
    model = groups.pop("model_folder", None)
    made = recipe(
        folder,
        "qwen2",  # biases and four heads in two groups
        parallel=parallel,
        training={"train_iters": STEPS},
        evaluation={"eval_on_start": True, "eval_interval": STEPS},
        resources={"tasks_per_node": world_size},
        **groups,
    )
    if model is not None:
        made = replace(made, model=Model(model=str(model), torch_dtype="float32"))
    run = write_run(made, folder / name)
    ranks.run(train, world_size=world_size, run_dir=str(run), stop_after=stop)
    return run


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def runs(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process from beginning to end, and a run of each layout that was stopped."""
    folder = tmp_path_factory.mktemp("shared")
    whole = _run(ranks, folder, "whole", "tp1")
    return {"whole": whole} | {layout: _run(ranks, folder, layout, layout, stop=STOP) for layout in LAYOUTS}


def _step(run: Path, step: int = STOP) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


@pytest.mark.parametrize(("saved", "loaded"), [("tp4", "tp1"), ("tp1", "tp4")])
def test_a_checkpoint_goes_on_at_another_layout(
    saved: str, loaded: str, ranks: RankServer, runs: dict[str, Path], tmp_path: Path
) -> None:
    moved = _run(ranks, tmp_path, "moved", loaded, checkpoint={"load": str(runs[saved])})
    found, expected = curve(moved), curve(runs["whole"])[STOP:]
    assert [step for step, _, _ in found] == [3, 4]
    for (_, loss, norm), (_, its_loss, its_norm) in zip(found, expected, strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-5), pytest.approx(its_norm, rel=1e-4))
    assert evaluations(moved)[-1][1] == pytest.approx(evaluations(runs["whole"])[-1][1], rel=1e-5)


def test_the_converter_reads_it(ranks: RankServer, runs: dict[str, Path], tmp_path: Path) -> None:
    """Whole tensors of four ranks, whatever their split: the bytes that the ranks exported themselves."""
    step = _step(runs["tp4"])
    convert(
        ConversionRequest(to_hf=True, mcore_model=step, model=step / "hf"), output_dir=tmp_path / "hf", verify=True
    )
    assert _same(_tensors(tmp_path / "hf"), _tensors(step / "hf"))


def test_a_folder_comes_back_byte_for_byte(ranks: RankServer, runs: dict[str, Path], tmp_path: Path) -> None:
    """Through four ranks, and through the converter and four ranks: saved again after a step that learns nothing."""
    folder = _step(runs["tp1"]) / "hf"
    convert(ConversionRequest(to_mcore=True, model=folder), output_dir=tmp_path / "mcore", verify=True)
    nothing: dict[str, Any] = {"learning_rate": {"lr_warmup_iters": 1}}  # begins at 0
    load = {"load": str(tmp_path / "mcore"), "finetune": True}
    plain = _run(ranks, tmp_path, "plain", "tp4", stop=1, model_folder=folder, **nothing)
    loaded = _run(ranks, tmp_path, "loaded", "tp4", stop=1, model_folder=folder, checkpoint=load, **nothing)
    for run in (plain, loaded):
        assert _same(_tensors(_step(run, 1) / "hf"), _tensors(folder))
