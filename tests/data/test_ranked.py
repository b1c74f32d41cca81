"""Rows with an anchor and texts like it or not: their shapes, their samples, and what is refused with its line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.tokenizer import load, train_bpe
from megabatch.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(["near and far words"], vocab_size=280, out_dir=tmp_path_factory.mktemp("tokenizer"))


def encoded(folder: Path, **fields: Any) -> Any:
    row = Row(Origin("rows.jsonl", 7, True), fields)
    return Encoder(Encoding(tokenizer=folder, rows="ranked")).encode([row])


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("fields", "texts", "label"),
    [
        ({"query": "a", "positive": "b", "negatives": ["c", "d"]}, ["a", "b", "c", "d"], math.nan),
        ({"anchor": "a", "positive": "b", "negative": "c"}, ["a", "b", "c"], math.nan),
        ({"sentence1": "a", "sentence2": "b", "score": 0.25}, ["a", "b"], 0.25),
        ({"query": "a", "positive": ["b"], "label": "1"}, ["a", "b"], 1.0),
    ],
)
def test_texts_have_the_ids_of_transformers(folder: Path, fields: Any, texts: list[str], label: float) -> None:
    chunk = encoded(folder, **fields)
    assert chunk.items == [len(texts)]
    assert [sample.ids.tolist() for sample in chunk.samples] == [load(folder)(text)["input_ids"] for text in texts]
    assert [sample.columns["role"] for sample in chunk.samples] == [0.0, 1.0, *[2.0] * (len(texts) - 2)]
    assert all(sample.columns["label"] == pytest.approx(label, nan_ok=True) for sample in chunk.samples)


def test_turns_are_rendered(folder: Path) -> None:
    fields = {"messages": turn("a"), "positive_messages": [turn("b")], "negative_messages": [turn("c"), turn("d")]}
    tokenizer, chunk = load(folder), encoded(folder, **fields)
    expected = [tokenizer.apply_chat_template(turn(text), tokenize=False) for text in "abcd"]
    assert [tokenizer.decode(sample.ids) for sample in chunk.samples] == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"positive": "b"}, "has none of query, anchor, sentence1 or messages"),
        ({"query": "a"}, "has none of positive, sentence2 or positive_messages; it has 'query'"),
        ({"query": " ", "positive": "b"}, "query must be a text that is not empty"),
        ({"query": "a", "positive": "b", "negatives": ["c", "b"]}, "one text is positive and negative"),
        (
            {"query": "a", "positive": "b", "negatives": ["c", 3]},
            "negatives must be a text that is not empty, not int 3",
        ),
        ({"query": "a", "positive": "b", "label": math.inf}, "label must be a finite number"),
        ({"query": "a", "positive_messages": [{"role": "user"}]}, "rows.jsonl:7"),
    ],
)
def test_another_row_is_refused_with_its_line(folder: Path, fields: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        encoded(folder, **fields)
    assert str(refused.value).startswith("rows.jsonl:7") and said in str(refused.value)
