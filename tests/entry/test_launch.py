"""Run directories: where they are, what is written, and what is left when a start fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megabatch import Checkpoint, LearningRate, Model, Parallel, Recipe
from megabatch.config.flags import Actions
from megabatch.config.run import RunConfig
from megabatch.entry.launch import Launch, prepare, written
from megabatch.errors import ConfigError, LaunchError
from megabatch.slurm.launcher_lock import LockedError


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _launch(recipe: Recipe, **actions: str) -> Launch:
    return prepare(recipe, Actions(local=True, **actions), recipe_file=Path(__file__))  # type: ignore[arg-type]


def test_versions_count_up_below_save(recipe: Recipe, tmp_path: Path) -> None:
    save = tmp_path / "megatron_output" / "tiny-qwen3"
    assert _launch(recipe).directory.path.parent == save
    assert _launch(recipe).directory.path.name.startswith("v0-")
    for name in ("v3-20260101-000000", "v12-20260101-000000", "vx-other"):
        (save / name).mkdir(parents=True)
    assert _launch(recipe).directory.path.name.startswith("v13-")


def test_without_versions_save_itself_is_the_run(recipe: Recipe, tmp_path: Path) -> None:
    asked = replace(recipe, checkpoint=Checkpoint(save="out", add_version=False))
    assert _launch(asked).directory.path == tmp_path / "out"
    assert _launch(asked, run_dir="other").directory.path == tmp_path / "other"


def test_run_json_holds_absolute_paths(recipe: Recipe, tmp_path: Path) -> None:
    asked = replace(
        recipe,
        data=replace(recipe.data, dataset=["train.jsonl#5", "org/hub#7", "example:arithmetic"]),
        model=replace(recipe.model, model="models/tiny-qwen3"),
        checkpoint=Checkpoint(save="out", load="earlier"),
        logging=replace(recipe.logging, tensorboard_dir="boards"),
        bridge=replace(recipe.bridge, adapters=["adapter"]),
        tuner=replace(recipe.tuner, tuner_type="lora"),
    )
    with written(_launch(asked), []) as directory:
        got = RunConfig.load(directory.run_json)
    assert got.recipe.data.dataset == (f"{tmp_path}/train.jsonl#5", "org/hub#7", "example:arithmetic")
    assert got.recipe.model.model == got.recipe.model.tokenizer == f"{tmp_path}/models/tiny-qwen3"
    assert got.recipe.checkpoint.save == f"{tmp_path}/out" and got.recipe.checkpoint.load == f"{tmp_path}/earlier"
    assert got.recipe.logging.tensorboard_dir == f"{tmp_path}/boards"
    assert got.recipe.bridge.adapters == (f"{tmp_path}/adapter",)
    assert got.run_dir == str(directory.path)


def test_values_of_wrong_types_are_all_named(recipe: Recipe) -> None:
    wrong = replace(
        recipe,
        model=Model(model=7),  # type: ignore[arg-type]
        parallel=Parallel(tensor_model_parallel_size="2"),  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError) as caught:
        _launch(wrong)
    assert {"model.model", "parallel.tensor_model_parallel_size"} <= {fault.field for fault in caught.value.faults}
    with pytest.raises(ConfigError, match="model must be a Model"):
        _launch(replace(recipe, model="Qwen/Qwen3-8B"))  # type: ignore[arg-type]


def test_planning_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    _launch(recipe).config(provenance={})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_start_leaves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LaunchError), written(_launch(recipe), []) as directory:
        directory.logs.mkdir()
        directory.script.write_text("#!/bin/bash")
        raise LaunchError("sbatch refused the job")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_start_in_a_given_folder_leaves_its_files(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(LaunchError), written(_launch(recipe, run_dir="mine"), []):
        raise LaunchError("sbatch refused the job")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_run_that_started_keeps_its_directory(recipe: Recipe) -> None:
    launch = _launch(recipe)
    with pytest.raises(KeyboardInterrupt), written(launch, []) as directory:
        directory.logs.mkdir()
        directory.rank_log(0, 0).touch()
        raise KeyboardInterrupt
    assert launch.directory.run_json.exists()


def test_the_same_run_goes_on_in_its_directory(recipe: Recipe) -> None:
    with written(_launch(recipe, run_dir="here"), ["first"]) as directory:
        first = directory.run_json.read_text()
    with written(_launch(recipe, run_dir="here"), ["second"]) as directory:
        assert directory.run_json.read_text() == first, "run.json is written once"


def test_two_launchers_never_share_a_run(recipe: Recipe) -> None:
    first = second = _launch(recipe)  # as of two that are planned in the same second
    with written(first, []):
        with pytest.raises(LockedError), written(second, []):
            pass
        with pytest.raises(LockedError), written(_launch(recipe, run_dir=str(first.directory.path)), []):
            pass
    with pytest.raises(LockedError), written(second, []):
        pass
    assert first.directory.run_json.exists() and not first.directory.launcher_lock.exists()


def test_another_run_is_refused_by_what_differs(recipe: Recipe) -> None:
    with written(_launch(recipe, run_dir="here"), []):
        pass
    other = replace(recipe, learning_rate=LearningRate(lr=0.5), task="pt")
    with pytest.raises(ConfigError, match=r"learning_rate\.lr") as caught, written(_launch(other, run_dir="here"), []):
        pass
    assert "task" in str(caught.value) and "megabatch resume" in str(caught.value)


def test_the_folder_of_a_sweep_is_no_run(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match="folder of a sweep"), written(_launch(recipe, run_dir="mine"), []):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["sweep.json"]


def test_a_disk_that_takes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """/proc takes no new files, as a full or read-only disk would not."""
    with pytest.raises(LaunchError, match="cannot be written"), written(_launch(recipe, run_dir="/proc/1/x/y"), []):
        pass
