"""A disk that really fills up: one error that names the place, nothing half-written, the last checkpoint intact."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rank_server import RankServer
from runs import recipe, train, write_run

from megabatch.run_directory import ExitCode

MIB = 2**20
SmallDisk = Callable[[float], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mounts a file system in memory of that many MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(mib: float) -> Path:
        size = f"size={int(mib * 1024)}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("only root may mount a small file system here; see test_resume.py for one without")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def train_or_say(run_dir: str) -> str:
    from megabatch.errors import MegabatchError

    try:
        return str(int(train(run_dir)))
    except MegabatchError as e:
        return str(e)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def test_a_checkpoint_that_does_not_fit(small_disk: SmallDisk, ranks: RankServer, tmp_path: Path) -> None:
    groups = {"checkpoint": {"save_interval": 2}, "resources": {"tasks_per_node": 2}, "training": {"train_iters": 4}}
    whole = write_run(recipe(tmp_path, **groups), tmp_path / "whole")
    ranks.run(train, world_size=2, run_dir=str(whole))
    checkpoint = size_of(whole / "checkpoints" / "step_00000002")
    room = size_of(whole) - checkpoint + checkpoint // 2
    run = write_run(recipe(tmp_path, **groups), small_disk(room / MIB) / "run")
    said = ranks.run(train_or_say, world_size=2, run_dir=str(run))
    assert all(text.startswith("the checkpoint of step 4 was not saved: ") for text in said), said
    # megatron-core 0.19 tells the kind of an error in a process of its own, not its words; torch's writer of archives
    # may notice that fewer bytes arrived before it looks at the error
    why = ("No space left on device", "OSError'>; 0 MiB are free there", "unexpected pos ")
    assert any(f"{run}/checkpoints/" in text and any(word in text for word in why) for text in said), said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002\n"
    # room was made: the run goes on from the checkpoint before
    subprocess.run(["mount", "-o", f"remount,size={4 * room}", str(run.parent)], check=True)
    assert ranks.run(train_or_say, world_size=2, run_dir=str(run)) == [str(int(ExitCode.DONE))] * 2
    for name in ("model.safetensors", "config.json"):
        made = [(folder / "checkpoints" / "step_00000004" / "hf" / name).read_bytes() for folder in (whole, run)]
        assert made[0] == made[1]


def test_metrics_that_do_not_fit(small_disk: SmallDisk, ranks: RankServer, tmp_path: Path) -> None:
    disk = small_disk(2)
    board = {"tensorboard_dir": str(tmp_path / "board")}  # whose writer would meet the full disk at its own time
    run = write_run(recipe(tmp_path, training={"train_iters": 100}, logging=board), disk / "run")
    ranks_said = ranks.run(fill_up_and_train, world_size=1, run_dir=str(run), disk=str(disk))
    assert ranks_said[0] == f"{run}/metrics.jsonl cannot be written (No space left on device); free space there"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert all(json.loads(line) for line in lines if line.endswith("\n"))


def fill_up_and_train(run_dir: str, disk: str) -> str:
    """Trains while a file takes what is left of the disk, after the first step."""
    from megabatch.trainer.watching.metrics import Metrics

    log_step = Metrics.log_step

    def logged(self: Metrics, record: object) -> object:
        with open(Path(disk, "filler"), "ab", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                pass
        for _ in range(40):  # what is left of the file's last page
            values = log_step(self, record)  # type: ignore[arg-type]
        return values

    Metrics.log_step = logged  # type: ignore[method-assign, assignment]
    return train_or_say(run_dir)
