"""Metrics in wandb and swanlab, written offline by the real packages and read back by their own formats."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import generating, metrics, recipe, train, write_run

from megabatch import Rollout
from megabatch.config.monitoring import missing_tracker
from megabatch.ledger.record import Record
from megabatch.ledger.writer import Ledger
from megabatch.run_directory import RunDirectory
from megabatch.trainer.watching.tracker import TrackerProcess

NO_KEYS = {"WANDB_API_KEY": "", "SWANLAB_API_KEY": ""}


def records(file: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which both packages use."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its end
            yield whole
            whole = b""


Found = tuple[set[str], dict[str, list[tuple[int, float]]], str]
"""Ids of the tracker's run, (step, value) by metric, and the configuration as text."""


def wandb_found(folder: Path) -> Found:
    from wandb.proto.wandb_internal_pb2 import Record

    ids, curves, config = set(), {}, ""
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, records(file)):
            values = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in values.items():
                curves.setdefault(name, []).append((values["step"], value))
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config += " ".join(item.value_json for item in record.run.config.update)
    return ids, curves, config


def swanlab_found(folder: Path) -> Found:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    ids, curves, config = set(), {}, ""
    for file in sorted(folder.glob("run-*/*.swanlab")):
        config += (file.parent / "files" / "config.yaml").read_text()
        for record in map(Record.FromString, records(file)):
            if record.HasField("start"):
                ids.add(record.start.id)
            if record.HasField("scalar"):
                one = record.scalar
                curves.setdefault(one.key, []).append((one.step, one.value.number))
    return ids, curves, config


def where_installed(package: str, *values: Any) -> Any:
    absent = importlib.util.find_spec(package) is None
    return pytest.param(package, *values, marks=pytest.mark.skipif(absent, reason=f"{package} is not installed"))


where_wandb_is = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def tracked_train(run_dir: str, stop_after: int | None = None) -> int:
    import os

    os.environ.update(NO_KEYS)
    return train(run_dir, stop_after)


@pytest.mark.parametrize(
    ("package", "read"), [where_installed("wandb", wandb_found), where_installed("swanlab", swanlab_found)]
)
def test_every_metric_arrives_and_a_resumed_run_goes_on(
    package: str, read: Any, ranks: RankServer, tmp_path: Path
) -> None:
    run = write_run(recipe(tmp_path, "qwen3", logging={"report_to": package}), tmp_path / "run")
    ranks.run(tracked_train, world_size=1, run_dir=str(run), stop_after=2)
    state = json.loads((run / "tracker.json").read_text())
    assert state["read"] == (run / "metrics.jsonl").stat().st_size
    ranks.run(tracked_train, world_size=1, run_dir=str(run))
    ids, curves, config = read(run / package)
    assert ids == {state["id"]}
    assert curves["train/loss"] == [(m["step"], pytest.approx(m["loss"])) for m in metrics(run)]
    assert curves["eval/loss"] == [(m["step"], pytest.approx(m["eval_loss"])) for m in metrics(run, "eval")]
    assert {"train/grad_norm", "train/tokens_per_s", "train/forward_backward_s"} <= curves.keys()
    assert "0.005" in config and "qwen3" in config and str(run) in config


def completion(number: int) -> Record:
    empty: Any = {"prompt_ids": (1,), "ids": (2, 3), "logps": (-1.0, -1.0), "versions": (0, 0), "mask": (1, 1)}
    reward = None if number == 0 else float(number)
    return Record(
        key=f"0/0/{number}", prompt="2+2?", completion=f"it is {number}", finish="stop", rewards={"right": reward},
        reward=reward, advantage=0.5, **empty,
    )  # fmt: skip


@where_wandb_is
def test_a_tracker_gets_the_best_and_worst_completions_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    made = generating(recipe(tmp_path, "qwen3", logging={"report_to": "wandb"}), Rollout())
    made = replace(made, grpo=replace(made.grpo, log_completions=True))
    run = RunDirectory(write_run(made, tmp_path / "run"))
    ledger = Ledger(run.ledger, max_bytes=2**20)
    for step in (1, 2):
        ledger.write(step, [completion(number) for number in range(20)])
        with open(run.metrics, "a") as file:
            file.write(json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\n")
        TrackerProcess("wandb", run, attempt=0).close(failed=False)
    assert json.loads(run.tracker.read_text())["shown"] == 2
    files = sorted(run.path.glob("wandb/wandb/offline-run-*/files/media/table/completions_*.table.json"))
    shown = [json.loads(file.read_text()) for file in files]
    assert len(shown) == 2, "each step once"
    for table in shown:
        assert table["columns"][:5] == ["key", "prompt", "completion", "reward", "reward_right"]
        assert [row[3] for row in table["data"]] == [19, 18, 17, 16, 4, 3, 2, 1]
        assert table["data"][0][2] == "it is 19"


FAILING = "class Settings:\n    def __init__(self, **k): ...\ndef init(**k): raise RuntimeError('no room\\nat all')\n"
HANGING = "import time\nclass Settings:\n    def __init__(self, **k): ...\ndef init(**k): time.sleep(1000)\n"


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        (FAILING, "wandb failed (no room); training goes on, and the next attempt delivers the rest"),
        (HANGING, "wandb has taken nothing for 1 s; training goes on without waiting for it"),
    ],
)
def test_one_that_fails_or_hangs_is_said_once_and_holds_nothing_up(
    fake: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(fake)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("WANDB_API_KEY", "")
    run = RunDirectory(write_run(recipe(tmp_path, "qwen3", logging={"report_to": "wandb"}), tmp_path / "run"))
    tracker = TrackerProcess("wandb", run, attempt=0, patience_s=1.0)
    for step in range(1, 50):
        tracker.write({"kind": "train", "step": step})
    with caplog.at_level(logging.WARNING):
        tracker.close(failed=False)
    told = capfd.readouterr().out
    assert told.count("WANDB_API_KEY is not set: wandb writes to ") == 1 and told.count(said) == 1
    assert len(caplog.records) == 1 and str(run.logs / "wandb.0.log") in caplog.text


def test_a_missing_package_has_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rule = missing_tracker("wandb")
    assert rule is not None and "needs the package wandb, which " in rule
    assert rule.endswith("lacks; pip install 'megabatch[wandb]'")
