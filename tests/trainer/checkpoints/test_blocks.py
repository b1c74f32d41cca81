"""Optimizer state that is read in more than one piece, as that of 180 million parameters of a rank is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, recipe, train, write_run


def in_pieces(run_dir: str, block_bytes: int) -> int:
    """Trains one rank that reads so much of its optimizer's state at once."""
    from megabatch.trainer.checkpoints import optimizer_state

    optimizer_state.BLOCK_BYTES = block_bytes
    return train(run_dir)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {}), (2, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2})],
)
def test_a_resume_in_pieces_is_the_same(
    world_size: int, parallel: dict[str, Any], ranks: RankServer, tmp_path: Path
) -> None:
    """The first stage, with two of three layers, has more pieces than the last."""
    groups: dict[str, Any] = {"model": {"num_layers": 3}, "parallel": parallel}
    run = write_run(recipe(tmp_path, "qwen3", **groups, resources={"tasks_per_node": world_size}), tmp_path / "run")
    ranks.run(train, world_size=world_size, run_dir=str(run), stop_after=2)
    runs = [tmp_path / name for name in ("whole", "pieces")]
    for copy, block_bytes in zip(runs, (2 << 30, 1), strict=True):
        shutil.copytree(run, copy)
        config = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps({**config, "run_dir": str(copy)}))
        ranks.run(in_pieces, world_size=world_size, run_dir=str(copy), block_bytes=block_bytes, timeout_s=120)
    assert curve(runs[1]) == curve(runs[0]) and len(curve(runs[0])) == 4
