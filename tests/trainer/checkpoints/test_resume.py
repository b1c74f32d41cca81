"""A run that was stopped, or lost, goes on as if nothing had happened."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run

from megabatch.run_directory import ExitCode
from megabatch.saved.manifest import MANIFEST

LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "dp2": (2, {}),
    "dp2_bfloat16": (2, {"model": {"torch_dtype": "bfloat16"}}),
    "dp2_plain_optimizer": (2, {"parallel": {"use_distributed_optimizer": False}}),
    "sgd": (2, {"parallel": {"use_distributed_optimizer": False}, "optimizer": {"optimizer": "sgd"},
                "learning_rate": {"lr": 0.1}}),
    "packed": (2, {"data": {"packing": True, "packing_length": 160}, "batch": {"global_batch_size": 4}}),
    "pp2_vpp2": (2, {"parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}}),
    "cp2_ep2_dp2": (4, {"parallel": {"context_parallel_size": 2, "expert_model_parallel_size": 2}}),
    "tp2_ep2_dp2": (4, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True,
                                     "expert_model_parallel_size": 2}}),
}  # fmt: skip
UNSEEN = {"eval_iters": 0}
"""No evaluation, in runs that ask about training alone."""


def _make(folder: Path, name: str, layout: str, **more: dict[str, Any]) -> tuple[Path, int]:
    world_size, groups = LAYOUTS[layout]
    groups = {**groups, **more, "resources": {"tasks_per_node": world_size}}
    groups["training"] = {"train_iters": 6, **groups.get("training", {})}
    if "vpp" not in layout:  # as few layers with experts as two stages need
        groups["model"] = {"num_layers": 2, **groups.get("model", {})}
    return write_run(recipe(folder, "qwen3_moe", **groups), folder / name), world_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stop_and_resume_give_the_uninterrupted_curve_bit_for_bit(
    layout: str, ranks: RankServer, tmp_path: Path
) -> None:
    whole, world_size = _make(tmp_path, "whole", layout)
    assert set(ranks.run(train, world_size=world_size, run_dir=str(whole))) == {ExitCode.DONE}
    cut, _ = _make(tmp_path, "cut", layout)
    stopped = ranks.run(train, world_size=world_size, run_dir=str(cut), stop_after=3)
    assert set(stopped) == {ExitCode.REQUEUE}
    assert [p.name for p in sorted((cut / "checkpoints").iterdir())] == ["latest", "step_00000003"]
    assert json.loads((cut / "heartbeat.json").read_text())["state"] == "stopped"
    assert set(ranks.run(train, world_size=world_size, run_dir=str(cut))) == {ExitCode.DONE}
    assert curve(cut) == curve(whole)
    assert evaluations(cut) == evaluations(whole)
    assert len(curve(cut)) == 6
    assert json.loads((cut / "heartbeat.json").read_text())["state"] == "done"


def test_a_lost_run_goes_on_from_its_last_checkpoint(ranks: RankServer, tmp_path: Path) -> None:
    whole, world_size = _make(tmp_path, "whole", "dp2", checkpoint={"save_interval": 2}, evaluation=UNSEEN)
    ranks.run(train, world_size=world_size, run_dir=str(whole))
    lost = tmp_path / "lost"
    shutil.copytree(whole, lost)
    made = json.loads((lost / "run.json").read_text())
    (lost / "run.json").write_text(json.dumps({**made, "run_dir": str(lost)}))
    for step in (4, 6):
        shutil.rmtree(lost / "checkpoints" / f"step_{step:08d}")
    half_written = lost / "checkpoints" / ".step_00000004.tmp"
    half_written.mkdir()
    (lost / "metrics.jsonl").unlink()
    ranks.run(train, world_size=world_size, run_dir=str(lost))
    assert curve(lost) == curve(whole)[2:]
    assert not half_written.exists()


def test_another_layout_goes_on_with_the_same_curve(ranks: RankServer, tmp_path: Path) -> None:
    deep: dict[str, Any] = {"model": {"num_layers": 4}, "evaluation": UNSEEN}
    whole, world_size = _make(tmp_path, "whole", "dp2", **deep)
    ranks.run(train, world_size=world_size, run_dir=str(whole))
    for saved in ("tp2_ep2_dp2", "cp2_ep2_dp2"):
        cut, _ = _make(tmp_path, saved, saved, **deep)
        ranks.run(train, world_size=4, run_dir=str(cut), stop_after=3)
    for saved, layout in (("tp2_ep2_dp2", "dp2"), ("tp2_ep2_dp2", "cp2_ep2_dp2"), ("cp2_ep2_dp2", "pp2_vpp2")):
        load = {"load": str(tmp_path / saved)}
        moved, world_size = _make(tmp_path, f"{saved}-{layout}", layout, checkpoint=load, **deep)
        ranks.run(train, world_size=world_size, run_dir=str(moved))
        for (step, loss, norm), expected in zip(curve(moved), curve(whole)[3:], strict=True):
            assert (step, loss) == (expected[0], pytest.approx(expected[1], rel=1e-5))
            assert norm == pytest.approx(expected[2], rel=1e-4)


def test_finetune_takes_only_the_weights(ranks: RankServer, tmp_path: Path) -> None:
    first, world_size = _make(tmp_path, "first", "dp2")
    ranks.run(train, world_size=world_size, run_dir=str(first))
    for load in (first, first / "checkpoints" / "step_00000006", first / "checkpoints" / "step_00000006" / "mcore"):
        again, _ = _make(tmp_path, f"again-{load.name}", "dp2", checkpoint={"load": str(load), "finetune": True})
        ranks.run(train, world_size=world_size, run_dir=str(again))
        assert [step for step, *_ in curve(again)] == [1, 2, 3, 4, 5, 6]
        assert evaluations(again)[0][1] == evaluations(first)[-1][1]


def test_only_what_should_be_kept_is_kept(ranks: RankServer, tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    for name, rules in {
        "all": {},
        "two": {"save_total_limit": 2},
        "every_fourth": {"save_retain_interval": 4},
        "weights": {"no_save_optim": True},
        "state": {"save_safetensors": False},
        "sometimes": {"save_safetensors_interval": 4},
    }.items():
        small: dict[str, Any] = {"model": {"num_layers": 1}, "batch": {"global_batch_size": 4}, "evaluation": UNSEEN}
        run, world_size = _make(tmp_path, name, "dp2", checkpoint={"save_interval": 1, **rules}, **small)
        ranks.run(train, world_size=world_size, run_dir=str(run))
        folders = sorted((run / "checkpoints").glob("step_*"))
        kept[name] = [int(p.name[5:]) for p in folders], sorted(p.name for p in folders[-1].iterdir())
    assert kept["all"] == ([1, 2, 3, 4, 5, 6], ["hf", "mcore", MANIFEST, "trainer.json"])
    assert kept["two"] == ([5, 6], ["hf", "mcore", MANIFEST, "trainer.json"])
    assert kept["every_fourth"] == ([4, 6], ["hf", "mcore", MANIFEST, "trainer.json"])
    assert kept["weights"] == ([1, 2, 3, 4, 5, 6], ["hf", MANIFEST, "trainer.json"])
    with_hf = [p.parent.name for p in sorted((tmp_path / "sometimes" / "checkpoints").glob("step_*/hf"))]
    assert with_hf == ["step_00000004", "step_00000006"], "the last has it always"
    assert kept["state"] == ([1, 2, 3, 4, 5, 6], ["mcore", MANIFEST, "trainer.json"])


def train_with_limit(run_dir: str, limit: int) -> str:
    """A rank whose files cannot grow beyond `limit` bytes, as on a disk that fills up; returns the error."""
    from megabatch.errors import CheckpointError

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train(run_dir)
    except CheckpointError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("limit", [60_000, 130_000])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_nothing_else(
    limit: int, ranks: RankServer, tmp_path: Path
) -> None:
    run, world_size = _make(tmp_path, "full", "dp2", checkpoint={"save_interval": 2}, model={"num_layers": 4})
    errors = ranks.run(train_with_limit, world_size=world_size, run_dir=str(run), limit=limit)
    assert all(error.startswith("the checkpoint of step 2 was not saved: ") for error in errors), errors
    assert any("File too large" in error or "cannot be written" in error for error in errors), errors
    assert list((run / "checkpoints").iterdir()) == []
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "failed"


def test_loss_averaged_by_micro_batch(ranks: RankServer, tmp_path: Path) -> None:
    """`calculate_per_token_loss=False`: each micro-batch counts the same, so the split matters and dp does not."""
    losses = {}
    for name, layout, batch in (("a", "dp2", 1), ("b", "dp2", 4)):
        groups: dict[str, Any] = {
            "training": {"calculate_per_token_loss": False},
            "batch": {"micro_batch_size": batch},
            "evaluation": UNSEEN,
        }
        run, world_size = _make(tmp_path, name, layout, **groups)
        ranks.run(train, world_size=world_size, run_dir=str(run))
        losses[name] = curve(run)
    averaged = {"calculate_per_token_loss": False, "train_iters": 6}
    small: dict[str, Any] = {"model": {"num_layers": 2}, "evaluation": UNSEEN}
    single = recipe(tmp_path, training=averaged, batch={"micro_batch_size": 1}, **small)
    run = write_run(replace(single), tmp_path / "single")
    ranks.run(train, world_size=1, run_dir=str(run))
    for (_, loss, norm), expected in zip(losses["a"], curve(run), strict=True):
        assert (loss, norm) == (pytest.approx(expected[1], rel=1e-5), pytest.approx(expected[2], rel=1e-4))
    assert losses["b"][1][2] != pytest.approx(losses["a"][1][2], rel=1e-4)
