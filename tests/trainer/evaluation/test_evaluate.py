"""`megabatch evaluate` on a run, its exported folder at two ranks, and what it refuses before a rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run

from megabatch.cli.command import main
from megabatch.cli.evaluate import _shown
from megabatch.config.run import RunConfig
from megabatch.trainer.evaluating import text_of

RERANKER: dict[str, dict[str, Any]] = {
    "training": {"task_type": "reranker", "train_iters": 2},
    "batch": {"global_batch_size": 4},
    "evaluation": {"eval_interval": 2, "eval_on_start": False},
    "data": {"dataset": ["example:arithmetic_ranked#8"], "val_dataset": ["example:arithmetic_ranked#5"]},
}


def evaluation(arguments: list[str], output: Path) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--output", str(output)]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_a_run_and_its_folder_have_the_metrics_of_its_last_evaluation(
    ranks: RankServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGABATCH_RUN", raising=False)
    data = {**RERANKER["data"], "max_length": 256}
    run = write_run(recipe(tmp_path, "qwen3", **{**RERANKER, "data": data}), tmp_path / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    last = metrics(run, "eval")[-1]
    names = ["loss", "mrr", "ndcg", "map", "recall_at_5", "ndcg_at_10", "auc", "ece", "brier"]
    assert main(["evaluate", str(run)]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert "recall_at_5" in capsys.readouterr().out
    folder = next((run / "checkpoints").glob("step_*/hf"))
    layout = [
        "--tasks_per_node",
        "2",
        "--micro_batch_size",
        "2",
        "--sequence_parallel",
        "--tensor_model_parallel_size",
        "2",
    ]
    asked = [str(folder), "--task", "reranker", "--torch_dtype", "float32", "--dataset", "example:arithmetic_ranked#5"]
    of_folder = evaluation([*asked, *layout], tmp_path / "folder.json")
    for name in names:
        assert found["metrics"][name] == pytest.approx(last[f"eval_{name}"], rel=1e-6), name
        assert of_folder["metrics"][name] == pytest.approx(last[f"eval_{name}"], rel=1e-5), name
    assert (found["task"], found["counts"]["ndcg"], of_folder["world_size"]) == ("reranker", 5, 2)
    assert not list(tmp_path.glob("**/.evaluation-*"))


def test_it_says_which_part_of_the_data_was_measured(tmp_path: Path) -> None:
    data = {"dataset": ["example:arithmetic#40"], "val_dataset": [], "split_dataset_ratio": 0.1}
    run = RunConfig.load(write_run(recipe(tmp_path, "qwen3", data=data), tmp_path / "run") / "run.json")
    document = json.loads(text_of(run, {}, 0.0))
    assert document["split_dataset_ratio"] == 0.1
    assert "\n  on the 10.0% set aside of example:arithmetic#40\n" in _shown(document, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "nothing is no run directory"),
        (["folder"], "--task is missing: a folder does not say what it is for"),
        (["folder", "--task", "dance"], "dance is no task"),
        (["folder", "--task", "sft"], "--dataset is missing"),
        (["folder", "--task", "sft", "--submit"], "--submit has no effect on an evaluation"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert main(["evaluate", *arguments]) == 2
    assert said in capsys.readouterr().err
