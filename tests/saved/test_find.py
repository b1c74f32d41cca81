"""What paths to checkpoints mean: each form once, for trainer, converters and the checks before the queue."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made import make_checkpoint

from megabatch import Checkpoint, Data, Recipe
from megabatch.converters.torch_dist.find import find_torch_dist
from megabatch.entry.input_checks import missing_inputs
from megabatch.entry.model import FoundModel
from megabatch.errors import CheckpointError, ConversionError
from megabatch.saved.find import NoCheckpointError, find_checkpoint, find_to_load

TRACKER = "latest_checkpointed_iteration.txt"
STEP_3 = ("step_00000003/mcore/.metadata", "step_00000003/trainer.json")
STEP_6 = ("step_00000006/mcore/.metadata", "step_00000006/trainer.json")


def layout(folder: Path, *files: str) -> Path:
    """A folder with these files, given as `name` or `name=text`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        path, _, text = name.partition("=")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def told_before_the_queue(path: Path) -> list[str]:
    recipe = Recipe(
        name="x",
        task="sft",
        data=Data(dataset=["example:arithmetic#8"]),
        checkpoint=Checkpoint(load=str(path), finetune=True),
    )
    told = map(str, missing_inputs(recipe, FoundModel(None, "not described")))
    return [fault for fault in told if fault.startswith("checkpoint.load")]


ONE = [
    ("", [".metadata"], "", ""),
    ("", [".metadata", f"{TRACKER}=7", "latest=step_00000006", *STEP_6], "", ""),
    ("mcore", ["mcore/.metadata"], "mcore", "mcore"),
    ("step_00000003", [*STEP_3], "step_00000003", "step_00000003/mcore"),
    ("step_00000003/mcore", [*STEP_3], "step_00000003", "step_00000003/mcore"),
    ("damaged.step_00000003", ["damaged.step_00000003/mcore/.metadata"], "damaged.step_00000003",
     "damaged.step_00000003/mcore"),
    ("iter_0000030", [f"{TRACKER}=20\n", "iter_0000030/.metadata"], "iter_0000030", "iter_0000030"),
]  # fmt: skip
"""A path below a folder, the folder's files, and the checkpoint and its weights that the path means."""
ONE_OF_MANY = [
    ([f"{TRACKER}=20\n", "iter_0000020/.metadata", "iter_0000030/.metadata"], "iter_0000020", ""),
    ([f"{TRACKER}=release", "release/.metadata", "iter_0000002/.metadata"], "release", ""),
    ([*STEP_3, *STEP_6], "step_00000006", "mcore"),
    ([*STEP_3, *STEP_6, "latest=step_00000003\n"], "step_00000003", "mcore"),
    ([*STEP_3, "latest=step_00000006"], "step_00000003", "mcore"),
    ([*STEP_3, "latest=../other/step_00000009"], "step_00000003", "mcore"),
    ([*STEP_3, "latest=/other/step_00000009"], "step_00000003", "mcore"),
    ([*STEP_3, "latest=\0"], "step_00000003", "mcore"),
    ([*STEP_3, "latest="], "step_00000003", "mcore"),
    ([*STEP_3, "later.step_00000009/mcore/.metadata"], "step_00000003", "mcore"),
]
"""Files of a folder, the checkpoint that it means, and where its weights are in there."""


def check(path: Path, folder: Path, weights: Path) -> None:
    found = find_checkpoint(path)
    assert (found.folder, found.weights) == (folder, weights)
    assert find_torch_dist(path) == weights
    assert find_to_load(str(path), may_be_missing=False) == found
    assert told_before_the_queue(path) == []


@pytest.mark.parametrize(("given", "files", "folder", "weights"), ONE)
def test_a_path_to_one_checkpoint(given: str, files: list[str], folder: str, weights: str, tmp_path: Path) -> None:
    layout(tmp_path, *files)
    check(tmp_path / given, tmp_path / folder, tmp_path / weights)


@pytest.mark.parametrize(("files", "folder", "weights"), ONE_OF_MANY)
def test_a_path_to_many_checkpoints_means_one(files: list[str], folder: str, weights: str, tmp_path: Path) -> None:
    """The folder that holds them, and the run directory whose `checkpoints/` it is."""
    many = layout(tmp_path / "run" / "checkpoints", *files)
    layout(tmp_path / "run", "run.json={}", "other/step_00000009/mcore/.metadata", "other/step_00000009/trainer.json")
    for path in (many, tmp_path / "run"):
        check(path, many / folder, many / folder / weights)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([f"{TRACKER}=../other"], "says '../other', which is neither a number of iterations nor 'release'"),
        ([f"{TRACKER}=/other"], "says '/other', which is neither"),
        ([f"{TRACKER}="], "says '', which is neither"),
        ([f"{TRACKER}=7", "iter_0000006/.metadata"], "names iter_0000007, which is not there; {} has iter_0000006, "),
        ([f"{TRACKER}=release"], "names release, which is not there"),
        (
            [f"{TRACKER}=7", "iter_0000007/mp_rank_00/x"],
            "iter_0000007 has no .metadata: of Megatron-LM's formats",
        ),
        (["trainer.json", "mcore/__0_0.distcp"], "{} is damaged: mcore/.metadata: is missing; load an older one"),
        (["step_00000003/hf/x"], "step_00000003 is damaged: mcore/.metadata: is missing"),
        (
            ["trainer.json", "megabatch-manifest.json={"],
            "{} is damaged: megabatch-manifest.json: ",
        ),
    ],
)
def test_what_leads_to_nothing_is_an_error_for_all(files: list[str], says: str, tmp_path: Path) -> None:
    """Also where a run may begin without a checkpoint: one is there."""
    folder = layout(tmp_path / "c", *files)
    layout(tmp_path / "other", ".metadata")
    with pytest.raises(CheckpointError) as caught:
        find_to_load(str(folder), may_be_missing=True)
    assert says.format(folder) in str(caught.value) and not isinstance(caught.value, NoCheckpointError)
    with pytest.raises(ConversionError) as converting:
        find_torch_dist(folder)
    assert str(converting.value) == str(caught.value)
    assert told_before_the_queue(folder) == [f"checkpoint.load: {caught.value}"]


@pytest.mark.parametrize("files", [[], ["a", "hf/config.json"], ["latest=step_00000003"], ["checkpoints/latest=x"]])
def test_what_is_there_instead_is_said(files: list[str], tmp_path: Path) -> None:
    folder = layout(tmp_path / "c", *files)
    names = ", ".join(sorted(os.listdir(folder))) or "no files"
    check_none(folder, f"{folder} holds no checkpoint; it has {names}. Give a run directory")


def test_a_folder_that_is_not_there_gets_the_nearest_name(tmp_path: Path) -> None:
    layout(tmp_path / "run-1")
    check_none(tmp_path / "rn-1", f"there is no folder {tmp_path / 'rn-1'}; did you mean {tmp_path / 'run-1'}?")


def check_none(path: Path, says: str) -> None:
    with pytest.raises(NoCheckpointError) as caught:
        find_checkpoint(path)
    assert str(caught.value).startswith(says)
    with pytest.raises(ConversionError) as converting:
        find_torch_dist(path)
    assert str(converting.value) == str(caught.value)
    assert find_to_load(str(path), may_be_missing=True) is None
    [fault] = told_before_the_queue(path)
    assert fault == f"checkpoint.load: {caught.value}; or set exit_on_missing_checkpoint=False to start from the model"


def test_an_older_checkpoint_never_stands_in_for_the_newest(tmp_path: Path) -> None:
    """With `no_save_optim` a run that stops to be requeued saves mcore/ all the same; its last checkpoint has none."""
    layout(tmp_path / "checkpoints", *STEP_3)
    make_checkpoint(tmp_path / "checkpoints" / "step_00000006", mcore=False)
    with pytest.raises(CheckpointError, match=r"saved with no_save_optim, without mcore/; .*step_00000006/hf, a Hug"):
        find_checkpoint(tmp_path)


def test_a_pipe_is_no_tracker(tmp_path: Path) -> None:
    layout(tmp_path, *STEP_3)
    for name in ("latest", TRACKER):
        os.mkfifo(tmp_path / name)
    assert find_checkpoint(tmp_path).folder.name == "step_00000003"
