"""A classifier's numbers at every layout, its checkpoints, and its export after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from headed import CLASSES, LABELS, merged, write_rows
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megabatch.trainer.evaluation import measures

GROUPS: dict[str, dict[str, Any]] = {
    "learning_rate": {"lr": 0.02, "min_lr": 0.02},
    "optimizer": {"adam_eps": 1e-3, "weight_decay": 0.0},
    "training": {"task_type": "seq_cls", "num_labels": CLASSES},
    "checkpoint": {"no_save_optim": True, "save_safetensors": False},
}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dp2": {},
    "tp2_sp": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "pp2_vpp2": {"parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}},
    "cp2_micro4": {"parallel": {"context_parallel_size": 2}, "batch": {"micro_batch_size": 4}},
    "ep2": {"parallel": {"expert_model_parallel_size": 2}},
}

WHOLE = ("eval_auc", "eval_ece", "eval_brier", "eval_f1_macro")
"""Measured of all samples at once, which ranks hold in parts."""


def made(folder: Path, model: str, ranks: int, groups: dict[str, dict[str, Any]]) -> Any:
    for name, count in (("train", 40), ("validation", 7)):
        if not (file := folder / f"{name}.jsonl").exists():
            write_rows(file, LABELS["single_label_classification"], count=count, seed=count)
    return recipe(folder, model, **merged(merged(GROUPS, groups), {"resources": {"tasks_per_node": ranks}}))


def run_of(ranks: RankServer, folder: Path, name: str, model: str, size: int, groups: dict[str, Any]) -> Path:
    run = write_run(made(folder, model, size, groups), folder / name)
    assert set(ranks.run(train, world_size=size, run_dir=str(run))) == {0}
    return run


@pytest.fixture(scope="module")
def references(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    saved = {"checkpoint": {"no_save_optim": False, "save_safetensors": True}}
    return {
        "qwen2": run_of(
            ranks, folder, "qwen2", "qwen2", 1, saved
        ),  # with tied embeddings, which a head has no use for
        "qwen3_moe": run_of(ranks, folder, "qwen3_moe", "qwen3_moe", 1, {}),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, references: dict[str, Path]) -> None:
    model = "qwen3_moe" if layout == "ep2" else "qwen2"
    run = run_of(ranks, references[model].parent, layout, model, 2, LAYOUTS[layout])
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(run, kind), metrics(references[model], kind), strict=True):
            for name in expected.keys() & {"loss", "grad_norm", "eval_loss", "eval_f1", "accuracy", "f1_1", *WHOLE}:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), (kind, found["step"], name)


def test_the_export_is_the_model_that_was_evaluated(references: dict[str, Path]) -> None:
    (folder,) = (references["qwen2"] / "checkpoints").glob("step_*/hf")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert (model.config.num_labels, model.config.problem_type) == (CLASSES, "single_label_classification")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said, true, losses, scores = [], [], [], []
    for line in (references["qwen2"].parent / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = row["text"] if "text" in row else tokenizer.apply_chat_template(row["messages"], tokenize=False)
        found = model(**tokenizer(text, return_tensors="pt"), labels=torch.tensor([row["label"]]))
        losses.append(float(found.loss.detach()))
        said.append(int(found.logits.argmax()))
        scores.append(found.logits[0].detach().double().numpy())
        true.append(row["label"])
    last = metrics(references["qwen2"], "eval")[-1]
    assert last["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert last["eval_accuracy"] == pytest.approx(sum(map(int.__eq__, said, true)) / len(true))
    assert last["eval_f1"] == last["eval_f1_macro"] == pytest.approx(_macro_f1(said, true))
    chances, classes = measures.softmax(np.stack(scores)), np.array(true)
    of_each = [measures.auc(chances[:, c], classes == c) for c in range(CLASSES)]
    assert last["eval_auc"] == pytest.approx(measures.mean(of_each))
    assert last["eval_brier"] == pytest.approx(measures.brier_of_classes(chances, classes), rel=1e-5)
    assert last["eval_ece"] == pytest.approx(
        measures.calibration_error(chances.max(1), np.array(said) == classes), rel=1e-5
    )


def _macro_f1(said: list[int], true: list[int]) -> float:
    scores = []
    for one in {*said, *true}:
        hits = sum(a == b == one for a, b in zip(said, true, strict=True))
        scores.append(2 * hits / (said.count(one) + true.count(one)))
    return sum(scores) / len(scores)


def test_a_run_resumes_at_another_layout(ranks: RankServer, references: dict[str, Path]) -> None:
    folder, saved = references["qwen2"].parent, {"checkpoint": {"no_save_optim": False}}
    run = write_run(made(folder, "qwen2", 2, merged(saved, LAYOUTS["tp2_sp"])), folder / "cut")
    assert ranks.run(train, world_size=2, run_dir=str(run), stop_after=2) == [75, 75]
    write_run(made(folder, "qwen2", 2, merged(saved, LAYOUTS["pp2_vpp2"])), run)
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [0, 0]
    for found, expected in zip(curve(run), curve(references["qwen2"]), strict=True):
        assert found == pytest.approx(expected, rel=2e-5)
