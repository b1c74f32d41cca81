"""`latest` decides where a run goes on; what is left behind is renamed, never deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made import make_checkpoint, make_run

from megabatch.errors import CheckpointError
from megabatch.run_directory import RunDirectory
from megabatch.saved.history import candidates, find, go_back, misplaced, notes, settle
from megabatch.saved.manifest import MANIFEST


def usable(run: RunDirectory) -> list[str]:
    return [path.name for path in candidates(run).usable]


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir() if path.is_dir())


def test_latest_decides(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2, 3)
    assert usable(run) == ["step_00000003", "step_00000002", "step_00000001"]
    run.latest.write_text("step_00000002\n")
    assert usable(run) == ["step_00000002", "step_00000001"]
    assert [path.name for path in candidates(run).later] == ["step_00000003"]


@pytest.mark.parametrize("text", ["", "step_00000009", "../x", "\0", "step_", "later.step_00000001"])
def test_where_latest_names_nothing_the_newest_counts(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2)
    run.latest.write_text(text)
    assert usable(run) == ["step_00000002", "step_00000001"]
    run.latest.unlink()
    assert usable(run) == ["step_00000002", "step_00000001"]


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)
    make_checkpoint(run.step(2), mcore=False)
    run.latest.write_text("step_00000002\n")
    assert usable(run) == ["step_00000001"]
    with pytest.raises(CheckpointError, match="without optimizer state"):
        find(run, "2")


def test_a_checkpoint_that_lost_everything_is_tried_and_so_found(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2)
    for path in run.step(2).rglob("*"):
        if path.is_file():
            path.unlink()
    assert usable(run)[0] == "step_00000002"
    (run.step(1) / MANIFEST).write_text("{")
    assert usable(run)[1] == "step_00000001"


def test_going_back(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2, 3)
    for name in ("step_00000002", "2", "step_00000002/"):
        assert find(run, name).name == "step_00000002"
    go_back(run, "2")
    assert names(run) == ["later.step_00000003", "step_00000001", "step_00000002"]
    assert run.latest.read_text() == "step_00000002\n"
    make_checkpoint(run.step(3))
    go_back(run, "1")
    assert names(run) == ["later.step_00000002", "later.step_00000003", "later.step_00000003.2", "step_00000001"]
    assert usable(run) == ["step_00000001"]
    with pytest.raises(CheckpointError) as error:
        go_back(run, "step_00000007")
    assert "no checkpoint 'step_00000007'; there are: step_00000001; set aside: later.step_00000003" in str(
        error.value
    )


def test_damage_is_noted_as_long_as_it_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2)
    [note] = settle(run, run.step(1), [(run.step(2), "mcore/__0_0.distcp: a differs from its digest")], [])
    assert notes(run) == [note]
    assert note.describe() == (
        "step_00000002 is damaged (mcore/__0_0.distcp: a differs from its digest), set aside as "
        "damaged.step_00000002; resumed from step_00000001"
    )
    with open(run.set_aside, "a") as file:
        file.write('{"kind": "dam')  # what a full disk leaves
    assert notes(run) == [note]
    (run.checkpoints / note.name).rename(run.step(2))
    assert notes(run) == []


def test_one_that_cannot_be_read_is_left_for_the_next_attempt(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2, 3)
    settle(run, run.step(1), [(run.step(3), "trainer.json: is missing")], [], point=False)
    assert usable(run) == ["step_00000002", "step_00000001"]


def test_a_note_that_a_kill_left_is_told_once(tmp_path: Path) -> None:
    """The note is written before the folder is renamed, and by the next attempt again."""
    run = make_run(tmp_path, 1, 2)
    [note] = settle(run, run.step(1), [(run.step(2), "trainer.json: is missing")], [])
    (run.checkpoints / note.name).rename(run.step(2))
    assert notes(run) == []
    [again] = settle(run, run.step(1), [(run.step(2), "trainer.json: is missing")], [])
    assert notes(run) == [again]


def test_a_checkpoint_that_lost_its_state_is_tried_and_so_found(tmp_path: Path) -> None:
    """Its `trainer.json` names the manifest that it was saved with."""
    run = make_run(tmp_path, 1, 2)
    shutil.rmtree(run.step(2) / "mcore")
    (run.step(2) / MANIFEST).unlink()
    assert usable(run) == ["step_00000002", "step_00000001"]


def test_a_checkpoint_in_anothers_folder_is_misplaced(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2)
    assert misplaced(run.step(2), 2) is None and misplaced(tmp_path, 2) is None
    fault = misplaced(run.step(2), 1)
    assert fault == "trainer.json: is of step 1: the folder is a copy of another checkpoint, or was renamed"
