"""Heads before the queue: which models may start a task, and rows that do not fit it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch import Batch, Data, Embedding, Model, Recipe, Reranker, Rlhf, Training
from megabatch.entry.input_checks import damaged_inputs
from megabatch.entry.model import FoundModel, find_model

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 8,
    "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
CLASSIFIER = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}


def model_for(folder: Path, training: Training, config: dict[str, Any]) -> FoundModel:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return find_model(Recipe(name="x", task="sft", model=Model(model=str(folder)), training=training))


def test_a_task_gives_the_model_its_head(tmp_path: Path) -> None:
    found = model_for(tmp_path, Training(task_type="seq_cls", num_labels=3), {})
    assert found.fault is None and found.shape is not None
    assert (found.shape.num_labels, found.shape.architecture) == (3, "Qwen2ForSequenceClassification")
    plain = model_for(tmp_path, Training(), {})
    assert plain.shape is not None and (plain.shape.num_labels, plain.fault) == (None, None)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (Training(), "its score head has 2 outputs and it has no output layer"),
        (Training(task_type="seq_cls", num_labels=3), "its score head has 2 outputs, and this run's has 3"),
        (Training(task_type="seq_cls", num_labels=2), None),
    ],
)
def test_a_classifier_starts_only_a_classifier_of_its_labels(
    tmp_path: Path, training: Training, said: str | None
) -> None:
    fault = model_for(tmp_path, training, CLASSIFIER).fault
    assert (fault is None) == (said is None)
    assert said is None or said in str(fault)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "good", "label": 4}, ":2: label must be a class from 0 to 2"),
        ({"text": " ", "label": 1}, ":2: text must be a string that is not empty"),
        ({"words": "good", "label": 1}, ":2: no accepted format has the fields"),
        ({"query": "good", "label": 1}, None),
    ],
)
def test_rows_are_checked_as_the_task_reads_them(tmp_path: Path, row: dict[str, Any], said: str | None) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in ({"text": "bad", "label": 0}, row)))
    recipe = Recipe(
        name="x", task="sft", data=Data(dataset=[str(file)]), training=Training(task_type="seq_cls", num_labels=3)
    )
    recipe = replace(recipe, batch=replace(recipe.batch, global_batch_size=2))
    faults = "; ".join(map(str, damaged_inputs(recipe, FoundModel(None, "none"))))
    assert (said or "") in faults and bool(faults) == bool(said)


def test_steps_are_checked_before_the_queue(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a", "completions": ["b", "c"], "labels": [true, 0]}\n{"prompt": "a", "completions": []}'
    )
    data = Data(dataset=[str(file)], max_length=8)
    recipe = Recipe(name="x", task="rlhf", rlhf=Rlhf(rlhf_type="prm"), data=data)
    recipe = replace(recipe, batch=replace(recipe.batch, global_batch_size=2))
    (fault,) = damaged_inputs(recipe, FoundModel(None, "none"))
    assert ":2: completions must be a list that is not empty" in str(fault)
    file.write_text('{"prompt": "a", "completions": ["b", "c"], "labels": [true, 1]}\n' * 2)
    (fault,) = damaged_inputs(recipe, FoundModel(None, "none"))
    assert ":1: has right steps alone, as all rows have" in str(fault)
    assert not damaged_inputs(recipe, FoundModel(None, "none"), trains=False)


PRM = {"architectures": ["Qwen2ForTokenClassification"], "id2label": {"0": "a", "1": "b"}}


@pytest.mark.parametrize(
    ("config", "said"),
    [(PRM, None), (CLASSIFIER, "its score head has no bias, and this run's has one"), ({}, None)],
)
def test_a_token_head_starts_only_token_heads(tmp_path: Path, config: dict[str, Any], said: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    found = find_model(Recipe(name="x", task="rlhf", rlhf=Rlhf(rlhf_type="prm"), model=Model(model=str(tmp_path))))
    assert (said or "") in str(found.fault) and (found.fault is None) == (said is None)
    if said is None:
        assert found.shape is not None and found.shape.head_bias
        assert (found.shape.num_labels, found.shape.architecture) == (2, "Qwen2ForTokenClassification")
    other = model_for(tmp_path, Training(task_type="seq_cls", num_labels=2), config).fault
    assert ("has a bias, and this run's has none" in str(other)) == (config is PRM)


LISTWISE = {"reranker": Reranker(loss_type="listwise_reranker")}
COSINE, CONTRASTIVE = ({"embedding": Embedding(loss_type=name)} for name in ("cosine_similarity", "contrastive"))
ALONE = {"query": "a", "positive": "b"}
LACKING = ":2: the query has no document that does not fit it"


@pytest.mark.parametrize(
    ("task_type", "groups", "row", "said"),
    [
        ("embedding", {}, ALONE, None),
        ("embedding", {}, {"query": "a", "positive": ["b", "c"]}, ":2: must have one positive text"),
        ("embedding", COSINE, ALONE, ":2: has no label, which embedding.loss_type='cosine_similarity' needs"),
        ("embedding", COSINE, {**ALONE, "label": 2}, ":2: has a label that is no cosine"),
        ("embedding", CONTRASTIVE, {**ALONE, "label": 0.5}, ":2: has another label than 0 and 1"),
        ("embedding", {"embedding": Embedding(infonce_use_batch=False)}, ALONE, ":2: has no negative text"),
        ("reranker", {}, ALONE, None),
        ("reranker", LISTWISE, ALONE, LACKING),
        ("generative_reranker", LISTWISE, ALONE, LACKING),
    ],
)
def test_what_a_loss_needs_of_a_row_is_found_before_the_queue(
    tmp_path: Path, task_type: Any, groups: dict[str, Any], row: dict[str, Any], said: str | None
) -> None:
    fits = {**ALONE, "label": 1} if groups in (COSINE, CONTRASTIVE) else {**ALONE, "negative": "c"}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in (fits, row)))
    training = Training(task_type=task_type)
    recipe = Recipe(name="x", task="sft", data=Data(dataset=[str(file)]), training=training, **groups)
    recipe = replace(recipe, batch=replace(recipe.batch, global_batch_size=2))
    faults = "; ".join(map(str, damaged_inputs(recipe, FoundModel(None, "none"))))
    assert (said or "") in faults and bool(faults) == bool(said)


def test_rows_of_one_kind(tmp_path: Path) -> None:
    """Classes, and documents of a pointwise reranker."""
    path = tmp_path / "rows.jsonl"
    made = Recipe(name="x", task="sft", model=Model(model=str(tmp_path)), data=Data(dataset=[str(path)]))
    made = replace(made, batch=Batch(global_batch_size=2))

    def faults(training: Training, *rows: dict[str, Any]) -> list[str]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = replace(made, training=training, reranker=Reranker(loss_type="pointwise_reranker"))
        found = map(str, damaged_inputs(recipe, FoundModel(None, "none")))
        return [fault for fault in found if fault.startswith("data.")]

    classes, documents = Training(task_type="seq_cls", num_labels=2), Training(task_type="reranker")
    (found,) = faults(classes, {"text": "a", "label": 1}, {"text": "b", "label": 1})
    assert found.startswith(f"data.dataset: {path}:1: has label 1, as all rows have; a classifier needs")
    assert not faults(classes, {"text": "a", "label": 1}, {"text": "b", "label": 0})
    (found,) = faults(documents, {"query": "a", "positive": "b"}, {"query": "c", "positive": "d"})
    assert found.startswith(f"data.dataset: {path}:1: the query has no document that does not fit it")
    assert not faults(documents, {"query": "a", "positive": "b"}, {"query": "c", "positive": "d", "negatives": ["e"]})
