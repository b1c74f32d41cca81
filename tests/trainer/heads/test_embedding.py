"""Embeddings: losses of sentence-transformers, one gradient for every split of the batch, and the exported folder."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import COMMON
from headed import GROUPS, merged, stepped
from in_sentence_transformers import NEEDS_SENTENCE_TRANSFORMERS, asked
from rank_server import RankServer
from runs import metrics, recipe, train, write_run
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer

from megabatch import Model, Recipe
from megabatch.data.tokens.tokenizer import train_bpe

EMBEDDING: dict[str, dict[str, Any]] = {
    "embedding": {"infonce_temperature": 0.5, "mrl_dims": [8], "mrl_weights": [0.5]},
    "training": {"task_type": "embedding", "train_iters": 3},
    "batch": {"global_batch_size": 4},
    "evaluation": {"eval_interval": 3},
    "checkpoint": {"no_save_optim": True},
}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2_sp": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "dp2_micro2": {"batch": {"micro_batch_size": 2}},
    "pp2_cp1": {"parallel": {"pipeline_model_parallel_size": 2}},
    "cp2": {"parallel": {"context_parallel_size": 2}},
}


def write_rows(path: Path, *, count: int, seed: int, least: int = 0) -> Path:
    """Args: least: negatives of each row."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            a, b = draw.randint(0, 99), draw.randint(0, 99)
            negatives = [str(draw.randint(0, 99)) for _ in range(least + number % 3)]
            file.write(json.dumps({"query": f"{a} + {b}", "positive": str(a + b), "negatives": negatives}) + "\n")
    return path


def made(folder: Path, ranks: int, groups: dict[str, dict[str, Any]]) -> Recipe:
    files = {"dataset": [str(folder / "train.jsonl")], "val_dataset": [str(folder / "validation.jsonl")]}
    every = merged(merged(merged(GROUPS, EMBEDDING), groups), {"resources": {"tasks_per_node": ranks}, "data": files})
    return replace(recipe(folder, "qwen2", **every), name="embedding")


@pytest.fixture(scope="module")
def reference(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    write_rows(folder / "train.jsonl", count=24, seed=0)
    write_rows(folder / "validation.jsonl", count=5, seed=1)
    run = write_run(made(folder, 1, {}), folder / "one")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return run


def loss_by_hand(folder: Path, rows: list[list[Any]]) -> tuple[torch.Tensor, Any]:
    """InfoNCE over texts of rows (anchor, positive, negatives), and of their first 8 dimensions by half, in fp32."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    vectors = [[model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in row] for row in rows]
    total = torch.zeros(())
    for dims, weight in ((None, 1.0), (8, 0.5)):
        unit = [[v[:dims] / v[:dims].norm() for v in row] for row in vectors]
        for one, row in enumerate(unit):
            others = [v for number, other in enumerate(unit) if number != one for v in other[1:]]
            scores = torch.stack([row[0] @ v / 0.5 for v in (*row[1:], *others)])
            total = total + weight * -scores.log_softmax(0)[0]
    return total / len(rows), model


def test_loss_and_gradients_are_those_of_the_whole_batch_by_hand(ranks: RankServer, reference: Path) -> None:
    folder = reference.parent
    run = write_run(made(folder, 1, {}), folder / "step")
    (found,) = ranks.run(stepped, world_size=1, run_dir=str(run), folder=str(folder / "hf"))
    rows: list[list[Any]] = []
    for ids, columns in found["rows"]:
        rows = [*rows, []] if columns["role"] == 0 else rows
        rows[-1].append(ids.tolist())
    loss, model = loss_by_hand(folder / "hf", rows)
    loss.backward()
    assert found["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    theirs = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters()}
    assert theirs.keys() == found["gradients"].keys()
    for name, gradient in theirs.items():
        own = torch.from_numpy(found["gradients"][name])
        assert float((own - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-3 * found["norm"]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, reference: Path) -> None:
    run = write_run(made(reference.parent, 2, LAYOUTS[layout]), reference.parent / layout)
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [0, 0]
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(run, kind), metrics(reference, kind), strict=True):
            for name in expected.keys() & {"loss", "grad_norm", "cosine", "eval_loss", "eval_cosine", "eval_mrr"}:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), (kind, found["step"], name)


def test_the_folder_says_how_its_vectors_are_made(reference: Path) -> None:
    (folder,) = (reference / "checkpoints").glob("step_*/hf")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2Model"
    paths = {one["path"]: one["type"].rpartition(".")[2] for one in json.loads((folder / "modules.json").read_text())}
    assert paths == {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True and name != "include_prompt"] == [
        "pooling_mode_lasttoken"
    ]
    assert pooling["word_embedding_dimension"] == model.config.hidden_size
    rows = [json.loads(line) for line in (reference.parent / "validation.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [[tokenizer(text)["input_ids"] for text in (row["query"], row["positive"])] for row in rows]
    vectors = [[model(torch.tensor([one])).last_hidden_state[0, -1] for one in pair] for pair in ids]
    cosines = [float(torch.cosine_similarity(*pair, dim=0).detach()) for pair in vectors]
    last = metrics(reference, "eval")[-1]
    assert last["eval_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)
    negatives = [tokenizer(text)["input_ids"] for row in rows for text in row["negatives"]]
    corpus = [pair[1] for pair in vectors] + [model(torch.tensor([one])).last_hidden_state[0, -1] for one in negatives]
    scores = [[float(torch.cosine_similarity(pair[0], one, dim=0)) for one in corpus] for pair in vectors]
    places = [1 + sum(score > row[number] + 1e-6 for score in row) for number, row in enumerate(scores)]
    assert last["eval_mrr"] == pytest.approx(sum(1 / place for place in places) / len(places))
    assert last["eval_recall_at_1"] == pytest.approx(sum(place == 1 for place in places) / len(places))


@pytest.fixture(scope="module")
def bare(ranks: RankServer, reference: Path) -> Path:
    """A run from a base model as sentence-transformers saves it: tensors without `model.`, and no output layer."""
    folder = reference.parent
    config = AutoConfig.for_model("qwen3", **{**COMMON, "architectures": ["Qwen3ForCausalLM"]})
    torch.manual_seed(7)
    AutoModel.from_config(config).save_pretrained(folder / "bare")
    declared = json.loads((folder / "bare" / "config.json").read_text())
    (folder / "bare" / "config.json").write_text(json.dumps({**declared, "architectures": ["Qwen3ForCausalLM"]}))
    train_bpe(["a small text"], vocab_size=300, out_dir=folder / "bare")
    (folder / "bare" / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "Find: "}}))
    model = Model(model=str(folder / "bare"), torch_dtype="float32")
    run = write_run(replace(made(folder, 1, {"embedding": {"pooling": "mean"}}), model=model), folder / "from_bare")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return run


def test_a_base_model_is_read_and_saved_under_its_own_names(bare: Path) -> None:
    (folder,) = (bare / "checkpoints").glob("step_*/hf")
    with safe_open(folder / "model.safetensors", "pt") as saved, \
            safe_open(bare.parent / "bare" / "model.safetensors", "pt") as begun:  # fmt: skip
        assert set(saved.keys()) == set(begun.keys())
        assert "embed_tokens.weight" in saved.keys()  # noqa: SIM118 - safetensors' own
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "Find: "}
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert metrics(bare, "eval")[-1]["eval_cosine"] == pytest.approx(_mean_cosine(model, folder, bare), rel=1e-5)


def _mean_cosine(model: Any, folder: Path, run: Path) -> float:
    """Of validation rows' anchors and positives, by transformers, with mean pooling."""
    tokenizer, cosines = AutoTokenizer.from_pretrained(folder), []
    for line in (run.parent / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = [tokenizer(row[name])["input_ids"] for name in ("query", "positive")]
        pair = [model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in ids]
        cosines.append(float(torch.cosine_similarity(*pair, dim=0).detach()))
    return sum(cosines) / len(cosines)


@NEEDS_SENTENCE_TRANSFORMERS
def test_sentence_transformers_makes_the_trainers_vectors(bare: Path, reference: Path) -> None:
    runs = (bare, reference)
    rows = [[json.loads(line) for line in (run.parent / "validation.jsonl").read_text().splitlines()] for run in runs]
    folders = [next((run / "checkpoints").glob("step_*/hf")) for run in runs]
    answers = asked(*(
        {"ask": "vectors", "folder": str(folder), "texts": [row[name] for row in each]}
        for folder, each in zip(folders, rows, strict=True)
        for name in ("query", "positive")
    ))  # fmt: skip
    for run, (a, b) in zip(runs, zip(answers[::2], answers[1::2], strict=True), strict=True):
        cosines = (torch.tensor(a) * torch.tensor(b)).sum(1)
        assert metrics(run, "eval")[-1]["eval_cosine"] == pytest.approx(float(cosines.mean()), rel=1e-5)
