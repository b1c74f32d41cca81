"""Data whose rows are each in order, and that together leave a loss nothing to tell apart: said by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabatch import Batch, Data, Model, Parallel, Recipe, Reranker, Resources, Rlhf, Training
from megabatch.config.new_model import declared_shape
from megabatch.config.run import resolve
from megabatch.data.prepare import prepare
from megabatch.errors import DataError

LONG = "one two three four five six seven " * 40
SHAPE: dict[str, Any] = {
    "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 8, "padded_vocab_size": 352, "max_position_embeddings": 256, "torch_dtype": "float32",
}  # fmt: skip
KTO: dict[str, Any] = {"task": "rlhf", "rlhf": Rlhf(rlhf_type="kto")}
Make = Callable[..., str]


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """What `megabatch prepare` says of rows for a task."""
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))

    def make(rows: list[dict[str, Any]], **settings: Any) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = Recipe(
            name="test",
            **{"task": "sft", "training": Training(max_epochs=1), **settings},
            parallel=Parallel(distributed_backend="gloo"),
            model=Model(model_type="qwen3", tokenizer=str(tokenizer_folder), **SHAPE),
            data=Data(dataset=[str(path)], max_length=128),
            batch=Batch(global_batch_size=2),
            resources=Resources(gpus_per_node=0),
        )
        shape = declared_shape(made)
        assert shape is not None
        return prepare(resolve(made, shape=shape, run_dir=tmp_path, provenance={}))

    return make


@pytest.mark.parametrize("bad", ["2", LONG])
def test_answers_of_one_kind(prepared: Make, bad: str) -> None:
    """Also where those of the other kind are too long."""
    rows = [{"query": "1 + 1?", "response": "2" if good else bad, "label": good} for good in (False, True) * 6]
    if bad == "2":
        assert "6 steps" in prepared(rows, **KTO)
        rows = rows[1::2]
    line, dropped = (2, r" \(6 rows were dropped: longer than max_length\)") if bad == LONG else (1, "")
    said = rf"rows\.jsonl:{line}: is a good answer, as all are; .* so add bad ones{dropped}$"
    with pytest.raises(DataError, match=said):
        prepared(rows, **KTO)


def test_texts_of_one_class(prepared: Make) -> None:
    training = Training(task_type="seq_cls", num_labels=2, max_epochs=1)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has label 1, as all rows have; a classifier needs"):
        prepared([{"text": f"{n} + 1", "label": 1} for n in range(8)], training=training)


@pytest.mark.parametrize("loss", ["pointwise_reranker", "listwise_reranker"])
def test_queries_without_another_document(prepared: Make, loss: Any) -> None:
    training, rows = (
        Training(task_type="reranker", max_epochs=1),
        [{"query": f"{n}?", "positive": str(n)} for n in range(8)],
    )
    both = [{**rows[0], "negatives": ["no"]}, *rows[1:]]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the query has no document that does not fit it"):
        prepared(rows, training=training, reranker=Reranker(loss_type=loss))
    if loss == "pointwise_reranker":
        assert "4 steps" in prepared(both, training=training, reranker=Reranker(loss_type=loss))
        return
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the query has no .* \(7 of 8 rows\)"):
        prepared(both, training=training, reranker=Reranker(loss_type=loss))


def test_nothing_is_left(prepared: Make) -> None:
    settings = {"task": "rlhf", "rlhf": Rlhf(rlhf_type="dpo")}
    equal = {"query": "1 + 1?", "response": "2", "rejected_response": "2"}
    long = {"query": "1 + 1?", "response": LONG, "rejected_response": "2"}
    said = (
        r"is left: 1 rows longer than max_length \(the first is .*rows\.jsonl:3\); 2 rows the chosen and the rejected "
        r"answer are the same tokens \(the first is .*rows\.jsonl:1\); check the data"
    )
    with pytest.raises(DataError, match=said):
        prepared([equal, equal, long], **settings)
