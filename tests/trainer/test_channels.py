"""A loss for each channel, with dynamic fine-tuning: equal at every layout, also for channels of one part alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro4": (1, {"batch": {"micro_batch_size": 4}}),
    "dp2": (2, {}),
    "tp2_sp": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}}),
}


def _channels(path: Path, channels: list[str | int | None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    named = [{**row, "kind": channels[index % len(channels)]} for index, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))


def _run(ranks: RankServer, folder: Path, name: str, world_size: int, groups: dict[str, Any]) -> Path:
    data = {"columns": {"kind": "channel"}, **groups.get("data", {})}
    training = {"enable_channel_loss": True, "enable_dft_loss": True}
    made = recipe(folder, "qwen2", **{**groups, "data": data, "training": training,
                                      "resources": {"tasks_per_node": world_size}})  # fmt: skip
    run = write_run(made, folder / name)
    assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {0}
    return run


@pytest.fixture(scope="module")
def reference(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    recipe(folder)  # writes the data
    _channels(folder / "train.jsonl", ["sums", 7, None, "sums"])
    _channels(folder / "validation.jsonl", ["sums", "unseen"])
    return _run(ranks, folder, "reference", 1, {})


def test_channels_add_up(reference: Path) -> None:
    names = ("7", "None", "sums", "unseen")
    for line in metrics(reference):
        assert line["loss_unseen"] is None and line["loss_unseen_count"] == 0
        for part in ("sum", "count"):
            assert sum(line[f"loss_{name}_{part}"] for name in names) == pytest.approx(line[f"loss_{part}"], rel=1e-6)
        assert line["loss_sums"] == line["loss_sums_sum"] / line["loss_sums_count"]
        assert line["loss"] < line["nll"], "every token's loss is weighed by its probability"
    for line in metrics(reference, "eval"):
        assert line["eval_loss_7"] is None and line["eval_loss_unseen_count"] > 0
        total = line["eval_loss_sums_sum"] + line["eval_loss_unseen_sum"]
        assert total == pytest.approx(line["eval_loss_sum"], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_channel(layout: str, ranks: RankServer, reference: Path) -> None:
    world_size, groups = LAYOUTS[layout]
    run = _run(ranks, reference.parent, layout, world_size, groups)
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(run, kind), metrics(reference, kind), strict=True):
            for name in [name for name in expected if "loss" in name or name in ("nll", "grad_norm")]:
                value = expected[name]
                same = value if value is None else pytest.approx(value, rel=2e-5)
                assert found[name] == same, (found["step"], name)
