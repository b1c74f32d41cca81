"""A reranker on the trainer: the same numbers in another layout, and an export that transformers ranks with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from headed import GROUPS, merged
from rank_server import RankServer
from runs import metrics, recipe, train, write_run
from test_embedding import write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megabatch import Recipe

RERANKER: dict[str, dict[str, Any]] = {
    "reranker": {"loss_type": "listwise_reranker", "listwise_reranker_temperature": 0.5},
    "training": {"task_type": "reranker", "train_iters": 3},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
    "evaluation": {"eval_interval": 3},
    "learning_rate": {"lr": 2e-3, "min_lr": 2e-3},
}


def made(folder: Path, ranks: int, **groups: dict[str, Any]) -> Recipe:
    files = {"dataset": [str(folder / "train.jsonl")], "val_dataset": [str(folder / "validation.jsonl")]}
    every = merged(merged(merged(GROUPS, RERANKER), groups), {"resources": {"tasks_per_node": ranks}, "data": files})
    return replace(recipe(folder, "qwen2", **every), name="reranker")


def test_layouts_and_transformers_agree_on_the_order(ranks: RankServer, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", count=24, seed=0, least=1)
    rows = write_rows(tmp_path / "validation.jsonl", count=5, seed=1, least=1)
    one = write_run(made(tmp_path, 1, rlhf={"share_prompts": False}), tmp_path / "one")
    assert ranks.run(train, world_size=1, run_dir=str(one)) == [0]
    two = write_run(made(tmp_path, 2, parallel={"context_parallel_size": 2}), tmp_path / "two")
    assert ranks.run(train, world_size=2, run_dir=str(two)) == [0, 0]
    first, shared = metrics(one)[0], metrics(two)[0]
    assert shared["tokens"] < first["tokens"], "a query is computed once for its documents"
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(two, kind), metrics(one, kind), strict=True):
            for name in expected.keys() & {"loss", "grad_norm", "eval_loss"}:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), (kind, name)
    (folder,) = (one / "checkpoints").glob("step_*/hf")
    losses, ranked = zip(*(_ranked(folder, json.loads(line)) for line in rows.read_text().splitlines()), strict=True)
    last = metrics(one, "eval")[-1]
    assert last["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert last["eval_mrr"] == pytest.approx(sum(ranked) / len(ranked))


def _ranked(folder: Path, row: dict[str, Any]) -> tuple[float, float]:
    """Listwise loss and reciprocal rank of a row, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for document in (row["positive"], *row["negatives"]):
        turns = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": document}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        scores.append(float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0].detach()))
    loss = -torch.tensor(scores).div(0.5).log_softmax(0)[0]
    return float(loss), 1 / (1 + sum(score > scores[0] for score in scores))
