"""Rows with an anchor and texts like it or not: their shapes, their samples, and what is refused with its line."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megabatch.config.embedding import Embedding
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.ranked import embedding_fault
from megabatch.data.tokens.encoder import CUT_ALIKE, Encoder
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
        ({"query": "a", "positive": "b", "label": False}, ["a", "b"], 0.0),
        ({"query": "a", "positive": "b", "label": "", "score": "0.5"}, ["a", "b"], 0.5),
        ({"query": "a", "positive": "b", "negatives": '["c", "d"]'}, ["a", "b", "c", "d"], math.nan),
        ({"query": "a", "positive": "b", "negatives": "[c] d"}, ["a", "b", "[c] d"], math.nan),
        ({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}, ["a", "b", "c", "d"], math.nan),
        ({"query": "a", "positive": "b", "negative": "c", "negatives": ["d"]}, ["a", "b", "c", "d"], math.nan),
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
        ({"query": "a", "positive": "b", "label": 10**400}, "label must be a finite number"),
        ({"query": "a", "positive": "b", "score": "good"}, "score must be a finite number, not str 'good'"),
        ({"query": "a", "positive_messages": [{"role": "user"}]}, "rows.jsonl:7"),
        ({"query": "a", "positive_messages": turn(" ")}, "positive_messages say nothing"),
        ({"messages": turn("\ud800"), "positive": "b"}, "message 0 holds half a surrogate pair"),
        ({"query": "a", "positive": "b", "images": ["x.png"]}, "the row has images"),
    ],
)
def test_another_row_is_refused_with_its_line(folder: Path, fields: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        encoded(folder, **fields)
    assert str(refused.value).startswith("rows.jsonl:7") and said in str(refused.value)


def test_negatives_of_all_fields_are_taken_and_other_columns_counted(folder: Path) -> None:
    chunk = encoded(folder, query="a", positive="b", negatives=[], negative_messages=[turn("c")], tools="f", score=1)
    assert chunk.items == [3]
    assert +chunk.remarks == Counter({"nothing reads the column 'tools'": 1})


@pytest.mark.parametrize("label", [0, False, "0.0", -0.2])
@pytest.mark.parametrize("rows", ["candidates", "yes_no"])
def test_a_positive_text_that_a_label_says_is_none_is_refused_where_no_label_is_read(
    folder: Path, rows: Any, label: Any
) -> None:
    row = Row(Origin("rows.jsonl", 7), {"query": "a", "positive": "b", "negatives": ["c"], "label": label})
    with pytest.raises(DataError, match=r"^rows.jsonl:7: says -?0(\.2)? \(label or score\) of its positive text"):
        Encoder(Encoding(tokenizer=folder, rows=rows)).encode([row])
    number = float(label) if isinstance(label, str) else label
    fault = embedding_fault(Embedding(infonce_use_batch=True), positives=1, negatives=0, label=number)
    assert fault is not None and "infonce read no label" in fault
    for read in (1, None, math.nan):
        assert embedding_fault(Embedding(infonce_use_batch=True), positives=1, negatives=0, label=read) is None


@pytest.mark.parametrize("rows", ["ranked", "candidates"])
def test_texts_that_are_cut_to_the_same_tokens_are_dropped(folder: Path, rows: Any) -> None:
    row = Row(Origin("rows.jsonl", 7), {"query": "a", "positive": "far " * 50 + "b", "negatives": ["far " * 50 + "c"]})
    cut = Encoder(Encoding(tokenizer=folder, rows=rows, max_length=40, truncation_strategy="right")).encode([row])
    assert (cut.items, cut.dropped, str(cut.first[CUT_ALIKE])) == ([], {CUT_ALIKE: 1}, "rows.jsonl:7")


def test_turns_without_a_system_message_get_the_recipes(folder: Path) -> None:
    own = [{"role": "system", "content": "own"}, *turn("b")]
    fields = {"messages": turn("a"), "positive_messages": [own], "negatives": ["c"]}
    for rows, texts in (
        ("ranked", [[("system", "S"), ("user", "a")], [("system", "own"), ("user", "b")], "c"]),
        ("candidates", [None, [("system", "S"), ("user", "a"), ("assistant", "c")]]),
    ):
        made = Encoder(Encoding(tokenizer=folder, rows=rows, system="S"))  # type: ignore[arg-type]
        given = fields if rows == "ranked" else fields | {"positive_messages": turn("b")}
        found = made.encode([Row(Origin("rows.jsonl", 7), given)]).samples
        for sample, expected in zip(found, texts, strict=True):
            if isinstance(expected, list):
                messages = [{"role": role, "content": content} for role, content in expected]
                asked = load(folder).apply_chat_template(messages, tokenize=False)
                assert load(folder).decode(sample.ids) == asked
            elif expected is not None:
                assert sample.ids.tolist() == load(folder)(expected)["input_ids"]
