"""What of a line of metrics becomes a curve, and which parts of a step have times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run

from megabatch.trainer.watching.sinks import MetricsFile, points

TIMED = {"data_s", "forward_backward_s", "optimizer_s"}


def test_points_are_finite_and_without_counts() -> None:
    line: dict[str, Any] = {"kind": "train", "step": 3, "attempt": 0, "loss": 2.0, "loss_sum": 8.0, "loss_count": 4.0}
    assert dict(points(line | {"grad_norm": math.nan, "margin": None, "word_count": 7})) == {
        "train/loss": 2.0,
        "train/word_count": 7,
    }
    assert dict(points({"kind": "eval", "step": 3, "eval_loss": 2.0, "seconds": 0.5})) == {
        "eval/loss": 2.0,
        "eval/seconds": 0.5,
    }


@pytest.mark.parametrize("torn", [0, 1, 70_000, 200_000])
@pytest.mark.parametrize("whole", ["", '{"step": 1}\n', "x" * 100_000 + "\n"])
def test_a_torn_last_line_is_cut_however_long_it_is(whole: str, torn: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(whole + "y" * torn)
    file = MetricsFile(path)
    file.write({"step": 2})
    file.close(failed=False)
    assert path.read_text() == whole + '{"step": 2}\n'


def scalars(folder: Path) -> dict[str, list[int]]:
    """Steps of each curve of TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_run_tells_the_times_of_its_parts(ranks: RankServer, tmp_path: Path) -> None:
    run = write_run(recipe(tmp_path, "qwen3", checkpoint={"save_interval": 2}), tmp_path / "run")
    ranks.run(train, world_size=1, run_dir=str(run))
    lines = metrics(run)
    assert all(line.keys() >= TIMED for line in lines)
    assert ["save_s" in line for line in lines] == [False, False, True, False]
    for line in lines:
        assert 0 < sum(line[name] for name in TIMED) <= line["step_s"]
    curves = scalars(run / "runs")
    assert curves["train/forward_backward_s"] == curves["train/loss"] == [1, 2, 3, 4]
    assert curves["eval/perplexity"] == curves["eval/loss"] == [0, 2, 4]
    assert not any(tag.endswith(("_sum", "_count")) for tag in curves)


def test_times_stay_out_where_nobody_asks(ranks: RankServer, tmp_path: Path) -> None:
    quiet = {"log_timers_to_tensorboard": False, "log_validation_ppl_to_tensorboard": False}
    made = recipe(tmp_path, "qwen3", logging={**quiet, "tensorboard_log_interval": 3})
    run = write_run(made, tmp_path / "run")
    ranks.run(train, world_size=1, run_dir=str(run))
    assert not any(line.keys() & TIMED for line in metrics(run))
    curves = scalars(run / "runs")
    assert curves["train/loss"] == [3] and "train/step_s" not in curves
    assert "eval/loss" in curves and "eval/perplexity" not in curves
