"""Labels of rows: what is accepted, and what is refused with its line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.labels import label_columns, label_of
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.tokenizer import load, train_bpe
from megabatch.errors import DataError

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def row(**fields: Any) -> Row:
    return Row(Origin("rows.jsonl", 7, True), fields)


@pytest.mark.parametrize(
    ("kind", "labels", "given", "expected"),
    [
        (SINGLE, 3, 2, [2]),
        (SINGLE, 3, "1", [1]),
        (SINGLE, 3, 1.0, [1]),
        (SINGLE, 2, "True", [1]),
        (SINGLE, 2, " false", [0]),
        (NUMBER, 1, 0.5, [0.5]),
        (NUMBER, 1, "-2e1", [-20]),
        (NUMBER, 1, [3], [3]),
        (NUMBER, 2, [1, 0.25], [1, 0.25]),
        (SEVERAL, 3, [0, 2], [1, 0, 1]),
        (SEVERAL, 3, [], [0, 0, 0]),
        (SEVERAL, 2, [1, 0], [1, 1]),
        (SEVERAL, 3, [0.0, 1.0, 0.0], [0, 1, 0]),
        (SEVERAL, 2, [False, True], [0, 1]),
        (SEVERAL, 3, "[1]", [0, 1, 0]),
    ],
)
def test_a_label_has_one_form(kind: Any, labels: int, given: Any, expected: list[float]) -> None:
    found = label_of(row(label=given), kind, labels, columns=None)
    assert list(found.values()) == expected
    assert tuple(found) == label_columns(kind, labels)


@pytest.mark.parametrize(
    ("kind", "labels", "given", "said"),
    [
        (SINGLE, 3, 3, "a class from 0 to 2, as training.num_labels=3 says, not int 3"),
        (SINGLE, 3, -1, "a class from 0 to 2"),
        (SINGLE, 3, 0.5, "a class from 0 to 2"),
        (SINGLE, 3, True, "a class from 0 to 2"),
        (SINGLE, 3, "good", "a class from 0 to 2, as training.num_labels=3 says, not str 'good'"),
        (SINGLE, 3, 10**400, "a class from 0 to 2"),
        (NUMBER, 1, 1e39, "must be a number"),
        (SINGLE, 2, "", "is missing"),
        (SINGLE, 3, None, "is missing; rename its column with data.columns"),
        (NUMBER, 1, [1, 2], "must be a number"),
        (NUMBER, 1, float("nan"), "must be a number"),
        (NUMBER, 2, 1.5, "must be a list of 2 numbers"),
        (SEVERAL, 3, 1, "must be the list of the row's classes"),
        (SEVERAL, 3, [0, 1, 0], "names a class twice"),
        (SEVERAL, 3, [1.0, 0.0], "1.0 or 0.0 for each of 3 labels"),
    ],
)
def test_another_label_is_refused_with_its_line(kind: Any, labels: int, given: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        label_of(row(label=given), kind, labels, columns=None)
    assert str(refused.value).startswith("rows.jsonl:7: label") and said in str(refused.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(["good and bad news"], vocab_size=280, out_dir=tmp_path_factory.mktemp("tokenizer"))


def encoded(folder: Path, *rows: Row, **settings: Any) -> Any:
    encoding = Encoding(tokenizer=folder, rows="labelled", problem_type=SINGLE, num_labels=2, **settings)
    return Encoder(encoding).encode(list(rows))


def test_texts_and_turns_have_the_ids_of_transformers(folder: Path) -> None:
    tokenizer, turns = load(folder), [{"role": "user", "content": "good?"}, {"role": "assistant", "content": "bad"}]
    rows = [
        row(text="good news", label=1),
        row(messages=turns, label=0),
        row(messages=turns[:1], label=0),
        row(query="good?", label=1),
        row(query="good?", response="bad", label=1),
        row(prompt="good?", system="Say it.", label=1),
        row(text="x", label=0),
    ]
    ids = [sample.ids.tolist() for sample in encoded(folder, *rows).samples]
    said = [turns, turns[:1], turns[:1], turns, [{"role": "system", "content": "Say it."}, turns[0]]]
    by_template = [tokenizer(tokenizer.apply_chat_template(one, tokenize=False))["input_ids"] for one in said]
    assert ids == [tokenizer("good news")["input_ids"], *by_template, tokenizer("x")["input_ids"]]
    assert len(ids[-1]) == 1, "one token is enough, since the whole sample is learned"


def test_columns_that_nothing_reads_are_counted(folder: Path) -> None:
    chunk = encoded(folder, row(text="good", label=1, mood="fair"), row(query="good", label=1, mood="fair"))
    assert chunk.remarks == Counter({"nothing reads the column 'mood'": 2})


def test_media_beside_a_text_are_refused_with_their_line(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the row has images, which a text model does not read"):
        encoded(folder, row(text="good", label=1, images=["a.png"]))


@pytest.mark.parametrize("text", ["", "  ", 3, "\ud800"])
def test_a_row_without_text_is_refused(folder: Path, text: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: text must be a string that is not empty"):
        encoded(folder, row(text=text, label=1))


@pytest.mark.parametrize("turns", [[("user", " ")], [("system", ""), ("user", "\n")]])
def test_turns_in_which_nobody_says_anything_are_refused(folder: Path, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the messages say nothing"):
        encoded(folder, row(messages=messages, label=1))


def test_a_sample_that_is_too_long_is_dropped_and_counted_or_cut(folder: Path) -> None:
    long = row(text="good and bad news " * 5, label=1)
    assert encoded(folder, long, max_length=4).dropped == {"longer than max_length": 1}
    (cut,) = encoded(folder, long, max_length=4, truncation_strategy="right").samples
    assert (len(cut.ids), cut.columns) == (4, {"label": 1.0})
