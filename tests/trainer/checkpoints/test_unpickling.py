"""Checkpoints cannot run code: neither their metadata nor the objects in them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, forget_digests, recipe, train, write_run

from megabatch.run_directory import ExitCode


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def train_or_say(run_dir: str) -> str:
    from megabatch.errors import CheckpointError

    try:
        return str(train(run_dir))
    except CheckpointError as e:
        return str(e)


@pytest.fixture(scope="module")
def half(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked to stop after two of its four steps."""
    folder = tmp_path_factory.mktemp("half")
    run = write_run(recipe(folder), folder / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [ExitCode.REQUEUE]
    return run


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    made = json.loads((to / "run.json").read_text())
    (to / "run.json").write_text(json.dumps({**made, "run_dir": str(to)}))
    forget_digests(to / "checkpoints" / "step_00000002")  # whoever changes a checkpoint can do as much
    return to


def test_its_own_checkpoint_is_data(half: Path, ranks: RankServer, tmp_path: Path) -> None:
    run = copied(half, tmp_path / "run")
    assert ranks.run(train_or_say, world_size=1, run_dir=str(run)) == [str(int(ExitCode.DONE))]
    assert [step for step, *_ in curve(run)] == [1, 2, 3, 4]


def test_metadata_that_would_run_code(half: Path, ranks: RankServer, tmp_path: Path) -> None:
    run = copied(half, tmp_path / "run")
    ran = tmp_path / "ran"
    (run / "checkpoints" / "step_00000002" / "mcore" / ".metadata").write_bytes(pickle.dumps(Runs(ran)))
    [said] = ranks.run(train_or_say, world_size=1, run_dir=str(run))
    assert "which no checkpoint consists of" in said
    assert not ran.exists()


def test_objects_that_would_run_code(half: Path, ranks: RankServer, tmp_path: Path) -> None:
    run = copied(half, tmp_path / "run")
    ran = tmp_path / "ran"
    ranks.run(
        put_into_checkpoint, world_size=1, folder=str(run / "checkpoints" / "step_00000002" / "mcore"), ran=str(ran)
    )
    [said] = ranks.run(train_or_say, world_size=1, run_dir=str(run))
    assert "an object in it is not plain data" in said
    assert not ran.exists()


def put_into_checkpoint(folder: str, ran: str) -> None:
    """Puts an object that makes a file in the place of the generators' state."""
    import io

    import torch
    from torch.distributed.checkpoint import FileSystemReader

    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    [place] = [place for index, place in metadata.storage_data.items() if index.fqn.startswith("rng_state")]
    stored = io.BytesIO()
    torch.save(Runs(Path(ran)), stored)
    assert len(stored.getvalue()) <= place.length, "it must fit where the generators' state was"
    with open(Path(folder, place.relative_path), "r+b") as file:
        file.seek(place.offset)
        file.write(stored.getvalue())
    place.length = len(stored.getvalue())
    with open(Path(folder, ".metadata"), "wb") as file:
        pickle.dump(metadata, file)
