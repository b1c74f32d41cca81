"""`ckpt_fully_parallel_load`: ranks that need the same bytes read them once, and resume as exactly as without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, recipe, train, write_run

from megabatch.run_directory import ExitCode

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "plain_optimizer": {"use_distributed_optimizer": False},
    "ep2": {"expert_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def loaded(run_dir: str) -> int:
    """Trains a rank of a run to its end; bytes of items that it read."""
    from megabatch.trainer.checkpoints.reading import Reader

    read, sizes = Reader._item, []

    def item(reader: Reader, file: int, name: str, offset: int, length: int) -> memoryview:
        sizes.append(length)
        return read(reader, file, name, offset, length)

    Reader._item = item  # type: ignore[method-assign]
    train(run_dir)
    return sum(sizes)


def _stopped(folder: Path, layout: str, ranks: RankServer) -> Path:
    made = recipe(folder, "qwen3_moe", parallel=LAYOUTS[layout], resources={"tasks_per_node": 2})
    run = write_run(made, folder / "stopped")
    assert set(ranks.run(train, world_size=2, run_dir=str(run), stop_after=2)) == {ExitCode.REQUEUE}
    return run


def _copy(run: Path, name: str, **checkpoint: Any) -> Path:
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    config = json.loads((copy / "run.json").read_text())
    config["run_dir"] = str(copy)
    config["recipe"]["checkpoint"] |= checkpoint
    (copy / "run.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resume_is_the_same_and_reads_less(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    run = _stopped(tmp_path, layout, ranks)
    alone, shared = _copy(run, "alone"), _copy(run, "shared", ckpt_fully_parallel_load=True)
    bytes_alone, bytes_shared = (sum(ranks.run(loaded, world_size=2, run_dir=str(each))) for each in (alone, shared))
    assert curve(shared) == curve(alone) and len(curve(alone)) == 4
    if layout == "pp2":
        assert bytes_shared == bytes_alone, "no two ranks need the same"
    else:
        assert bytes_shared < 0.7 * bytes_alone


def test_damage_is_found_by_whoever_reads_it(ranks: RankServer, tmp_path: Path) -> None:
    made = recipe(tmp_path, "qwen3", checkpoint={"save_interval": 1}, resources={"tasks_per_node": 2})
    run = write_run(made, tmp_path / "run")
    ranks.run(train, world_size=2, run_dir=str(run), stop_after=2)
    copy = _copy(run, "damaged", ckpt_fully_parallel_load=True)
    file = max((copy / "checkpoints" / "step_00000002" / "mcore").glob("*.distcp"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert set(ranks.run(train, world_size=2, run_dir=str(copy))) == {ExitCode.DONE}
    assert [path.name for path in (copy / "checkpoints").glob("damaged.*")] == ["damaged.step_00000002"]
