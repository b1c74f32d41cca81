"""A generative reranker: losses and gradients of transformers, the same numbers in other layouts, exact resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import make_base
from headed import GROUPS, merged, stepped
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_run
from test_embedding import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from megabatch import Model, Recipe

YES, NO = "y", "Ċ"
"""Of the vocabulary's first and second half, which two tensor-parallel ranks hold."""
RERANKER: dict[str, dict[str, Any]] = {
    "reranker": {
        "loss_type": "listwise_reranker",
        "listwise_reranker_temperature": 0.5,
        "generative_reranker_positive_token": YES,
        "generative_reranker_negative_token": NO,
        "generative_reranker_instruction": "Is it the sum?",
    },
    "training": {"task_type": "generative_reranker", "train_iters": 3},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
    "evaluation": {"eval_interval": 3},
    "data": {"system": "Judge.", "max_length": 256},
    "learning_rate": {"lr": 2e-3, "min_lr": 2e-3},
}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "pp2_cp2": {"parallel": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}},
}


def made(folder: Path, ranks: int, **groups: dict[str, Any]) -> Recipe:
    files = {"dataset": [str(folder / "train.jsonl")], "val_dataset": [str(folder / "validation.jsonl")]}
    every = merged(merged(merged(GROUPS, RERANKER), groups), {"resources": {"tasks_per_node": ranks}, "data": files})
    model = Model(model=str(folder / "dense"), torch_dtype="float32")
    return replace(recipe(folder, "qwen3", **every), name="generative-reranker", model=model)


@pytest.fixture(scope="module")
def reference(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generative")
    make_base(folder, "dense")
    write_rows(folder / "train.jsonl", count=24, seed=0, least=1)
    write_rows(folder / "validation.jsonl", count=5, seed=1, least=1)
    run = write_run(made(folder, 1), folder / "one")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return run


def asked(tokenizer: Any, row: dict[str, Any], document: str) -> str:
    said = f"<Instruct>: Is it the sum?\n<Query>: {row['query']}\n<Document>: {document}"
    turns = [{"role": "system", "content": "Judge."}, {"role": "user", "content": said}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return text


def test_the_saved_language_model_scores_as_the_trainer_does(reference: Path) -> None:
    (folder,) = (reference / "checkpoints").glob("step_*/hf")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yes, no = tokenizer.convert_tokens_to_ids([YES, NO])
    assert yes < 151 <= no, "on different ranks"
    losses, ranks = [], []
    for line in (reference.parent / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = [asked(tokenizer, row, document) for document in (row["positive"], *row["negatives"])]
        with torch.no_grad():
            last = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts]
        scores = torch.stack([one[yes] - one[no] for one in last])
        losses.append(-float((scores / 0.5).log_softmax(0)[0]))
        ranks.append(1 / (1 + int((scores > scores[0]).sum())))
    found = metrics(reference, "eval")[-1]
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["eval_mrr"] == pytest.approx(sum(ranks) / len(ranks))


def test_pointwise_loss_and_gradients_are_those_of_transformers(ranks: RankServer, reference: Path) -> None:
    folder = reference.parent
    run = write_run(made(folder, 1, reranker={"loss_type": "pointwise_reranker"}), folder / "step")
    (found,) = ranks.run(stepped, world_size=1, run_dir=str(run), folder=str(folder / "hf"))
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    yes, no = AutoTokenizer.from_pretrained(folder / "hf").convert_tokens_to_ids([YES, NO])
    last = torch.stack([model(torch.from_numpy(ids)[None]).logits[0, -1] for ids, _ in found["rows"]])
    fits = torch.tensor([int(columns["fits"]) for _, columns in found["rows"]])
    loss = torch.nn.functional.cross_entropy(last[:, [no, yes]], fits)
    loss.backward()
    assert found["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        own = torch.from_numpy(np.asarray(found["gradients"][name]))
        assert parameter.grad is not None
        difference = float((own - parameter.grad).norm())
        assert difference <= 1e-5 * max(float(parameter.grad.norm()), 1e-3 * found["norm"]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, reference: Path) -> None:
    run = write_run(made(reference.parent, 4, **LAYOUTS[layout]), reference.parent / layout)
    assert set(ranks.run(train, world_size=4, run_dir=str(run))) == {0}
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(run, kind), metrics(reference, kind), strict=True):
            for name in expected.keys() & {"loss", "grad_norm", "mrr", "eval_loss", "eval_ndcg"}:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), (kind, found["step"], name)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(ranks: RankServer, reference: Path) -> None:
    run = write_run(made(reference.parent, 1), reference.parent / "stopped")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [75]
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    assert curve(run) == curve(reference)


def test_adapters_train_the_answers(ranks: RankServer, reference: Path) -> None:
    lora = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
    run = write_run(made(reference.parent, 1, tuner=lora), reference.parent / "lora")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    first, last = metrics(run, "eval")[0], metrics(run, "eval")[-1]
    assert first["eval_loss"] == metrics(reference, "eval")[0]["eval_loss"], "the adapter adds nothing at first"
    assert last["eval_loss"] != first["eval_loss"]
    assert (next(iter((run / "checkpoints").glob("step_*/hf"))) / "config.json").is_file()
