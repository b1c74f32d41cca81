"""Inputs that the container of a profile would not show to the ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megabatch import Recipe
from megabatch.config.flags import Actions
from megabatch.entry.launch import prepare
from megabatch.entry.mounts import unmounted


def faults(recipe: Recipe, folder: Path, container: str) -> dict[str, str]:
    profile = folder / "profile.toml"
    profile.write_text(f'local_cache = "/var/cache"\n{container}')
    actions = Actions(submit=True, cluster=str(profile), run_dir=str(folder / "runs" / "run"))
    launch = prepare(recipe, actions, recipe_file=Path(__file__))
    return {fault.field: str(fault) for fault in unmounted(launch)}


PYXIS = '[container]\nimage = "a#b:c"\n'


@pytest.fixture
def asked(recipe: Recipe, model_folder: Path, dataset: Path) -> Recipe:
    model = replace(recipe.model, model=str(model_folder))
    return replace(recipe, model=model, data=replace(recipe.data, dataset=[str(dataset), "example:arithmetic"]))


def test_each_input_outside_the_mounts_is_named_with_the_folder_to_add(
    asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    found = faults(asked, tmp_path, PYXIS)
    assert set(found) == {"model.model", "data.dataset"}
    assert f"add '{tmp_path}' to container.mounts" in found["data.dataset"]
    assert set(faults(asked, tmp_path, f'{PYXIS}mounts = ["{tmp_path}/models"]\n')) == {"data.dataset"}
    assert faults(asked, tmp_path, f'{PYXIS}mounts = ["{tmp_path}"]\n') == {}
    other_name = f'{PYXIS}mounts = ["{tmp_path}:/inside"]\n'
    assert set(faults(asked, tmp_path, other_name)) == {"model.model", "data.dataset"}, (
        "recipes name the host's folders"
    )
    assert faults(asked, tmp_path, "") == {}


def test_apptainer_shows_home_and_tmp_unless_told_not_to(
    asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    apptainer = '[container]\nruntime = "apptainer"\nimage = "i.sif"\n'
    assert faults(asked, tmp_path, apptainer) == {}
    assert set(faults(asked, tmp_path, f'{apptainer}options = ["--containall"]\n')) == {"model.model", "data.dataset"}
    assert set(faults(asked, tmp_path, PYXIS)) == {"model.model", "data.dataset"}
    assert faults(asked, tmp_path, f'{PYXIS}options = ["--container-mount-home"]\n') == {}
