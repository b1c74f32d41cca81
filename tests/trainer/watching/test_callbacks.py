"""Callbacks and traces in whole runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run

NOTING = """
import json, os

class Noting:
    def __init__(self):
        self.file = open(os.path.join(os.path.dirname(__file__), "noted"), "a")

    def note(self, *what):
        print(json.dumps(what), file=self.file, flush=True)

    def on_step(self, step, metrics):
        self.note("step", step, metrics["loss"])

    def on_evaluate(self, step, metrics):
        self.note("evaluate", step, metrics["eval_loss"])

    def on_save(self, step, path):
        self.note("save", step, path)

    def on_end(self, step, outcome):
        self.note("end", step, outcome)

class Broken:
    def on_step(self, step, metrics):
        if step == 2:
            raise KeyError("no such thing")
"""


@pytest.mark.parametrize("async_save", [False, True])
def test_callbacks_hear_of_everything_once(async_save: bool, ranks: RankServer, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NOTING)
    made = recipe(
        tmp_path,
        "qwen3",
        watching={"callbacks": (f"{tmp_path}/mine.py:Noting",)},
        checkpoint={"save_interval": 2, "async_save": async_save},
        resources={"tasks_per_node": 2},
    )
    run = write_run(made, tmp_path / "run")
    ranks.run(train, world_size=2, run_dir=str(run))
    noted = [json.loads(line) for line in (tmp_path / "noted").read_text().splitlines()]
    assert [n[1:] for n in noted if n[0] == "step"] == [[m["step"], m["loss"]] for m in metrics(run)]
    assert [n[1:] for n in noted if n[0] == "evaluate"] == [[m["step"], m["eval_loss"]] for m in metrics(run, "eval")]
    assert [n[1:] for n in noted if n[0] == "save"] == [[s, f"{run}/checkpoints/step_{s:08d}"] for s in (2, 4)]
    assert noted[-1] == ["end", 4, "done"]


def train_or_say(run_dir: str) -> str:
    from megabatch.errors import MegabatchError

    try:
        train(run_dir)
    except MegabatchError as e:
        return str(e)
    return ""


def test_one_that_raises_ends_the_run_with_its_line(ranks: RankServer, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NOTING)
    made = recipe(tmp_path, "qwen3", watching={"callbacks": (f"{tmp_path}/mine.py:Broken",)})
    [said] = ranks.run(train_or_say, world_size=1, run_dir=str(write_run(made, tmp_path / "run")))
    assert said == "callback Broken.on_step of step 2 failed: mine.py:26: KeyError: 'no such thing'"


def test_the_ranks_that_are_asked_trace_the_steps(ranks: RankServer, tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        "qwen3",
        watching={"profile_steps": "2:3", "profile_ranks": (1,)},
        resources={"tasks_per_node": 2},
    )
    run = write_run(made, tmp_path / "run")
    ranks.run(train, world_size=2, run_dir=str(run))
    [trace] = (run / "profile").iterdir()
    assert trace.name == "steps_2-3.rank_1.0.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert {"step 2", "step 3"} <= set(names) and "step 4" not in names and any("aten::" in name for name in names)
