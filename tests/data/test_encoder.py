from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens.encoder import ROWS, Encoder, pieces
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Encoded, Item
from megabatch.errors import DataError


def row(number: int = 1, **fields: Any) -> Row:
    return Row(Origin("train.jsonl", number), fields)


SHORT = row(1, query="Q", response="A")
LONG = row(2, query="Q", response="A" * 50)


def encoder(folder: Path, **settings: Any) -> Encoder:
    return Encoder(Encoding(tokenizer=folder, **settings))


def test_whole_samples_within_the_limit(tokenizer_folder: Path) -> None:
    chunk = encoder(tokenizer_folder, max_length=20).encode([SHORT])
    assert [str(origin) for origin in chunk.origins] == ["train.jsonl:1"]
    assert not chunk.dropped


def test_delete_drops_and_counts(tokenizer_folder: Path) -> None:
    chunk = encoder(tokenizer_folder, max_length=20, truncation_strategy="delete").encode([LONG, SHORT, LONG])
    assert [str(origin) for origin in chunk.origins] == ["train.jsonl:1"]
    assert chunk.dropped == {"longer than max_length": 2}


@pytest.mark.parametrize(("strategy", "part"), [("left", slice(-20, None)), ("right", slice(20))])
def test_cutting_keeps_one_end_and_predicts_no_first_token(tokenizer_folder: Path, strategy: Any, part: slice) -> None:
    (whole,) = encoder(tokenizer_folder).encode([LONG]).samples
    (cut,) = encoder(tokenizer_folder, max_length=20, truncation_strategy=strategy).encode([LONG]).samples
    assert cut.ids.tolist() == whole.ids[part].tolist()
    assert cut.weights.tolist() == [0.0, *whole.weights[part].tolist()[1:]]


def test_documents_are_learned_whole_and_end_with_eos(tokenizer_folder: Path, bpe: Any) -> None:
    (encoded,) = encoder(tokenizer_folder, rows="documents").encode([row(1, text="two plus two")]).samples
    assert bpe.decode(encoded.ids) == "two plus two<|im_end|>"
    assert encoded.weights.tolist() == [0.0] + [1.0] * (len(encoded.ids) - 1)


class Pairs:
    """Two samples from each row: its longer and its shorter half, with a label each."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self.tokenizer = tokenizer

    def encode(self, rows: Any, remarks: Any) -> list[Item]:
        return [[self._sample(row.fields["long"], 1.0), self._sample(row.fields["short"], 0.0)] for row in rows]

    def _sample(self, text: str, label: float) -> Encoded:
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        weights = np.ones(len(ids), np.float32)
        weights[:1] = 0
        return Encoded(ids, weights, {"label": label}, {"place": np.arange(len(ids), dtype=np.int32)})


def test_an_item_is_kept_cut_or_dropped_as_a_whole(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "conversations", Pairs)
    rows = [row(1, long="apple " * 9, short="two"), row(2, long="four " * 3, short="seven two")]
    whole = encoder(tokenizer_folder).encode(rows)
    assert (whole.items, [o.number for o in whole.origins]) == ([2, 2], [1, 1, 2, 2])
    limit = len(whole.samples[0].ids) - 1
    dropped = encoder(tokenizer_folder, max_length=limit).encode(rows)
    assert (dropped.items, [o.number for o in dropped.origins]) == ([2], [2, 2])
    assert dropped.dropped == {"longer than max_length": 1}
    cut = encoder(tokenizer_folder, max_length=limit, truncation_strategy="left").encode(rows)
    assert cut.items == [2, 2]
    assert cut.samples[0].ids.tolist() == whole.samples[0].ids[1:].tolist()
    assert cut.samples[0].token_columns["place"].tolist() == list(range(1, limit + 1))
    assert cut.samples[0].weights.tolist() == [0.0] + [1.0] * (limit - 1)
    assert [sample.columns["label"] for sample in cut.samples] == [1.0, 0.0, 1.0, 0.0]
    assert cut.samples[1].ids.tolist() == whole.samples[1].ids.tolist()


@pytest.mark.parametrize("limit", [2, 3, 7, 20, 21])
def test_pieces_of_a_document_learn_every_token_once(tokenizer_folder: Path, limit: int) -> None:
    document = row(4, text="How many apples are in the basket? There are seven apples in it. " * 3)
    (whole,) = encoder(tokenizer_folder, rows="documents").encode([document]).samples
    made = encoder(tokenizer_folder, rows="documents", max_length=limit, truncation_strategy="split")
    chunk = made.encode([document, row(5, text="two")])
    parts = [s for s, o in zip(chunk.samples, chunk.origins, strict=True) if o.number == 4]
    assert {len(part.ids) for part in parts[:-1]} <= {limit}
    assert 2 <= len(parts[-1].ids) <= limit
    assert [int(i) for part in parts for i in part.ids[part.weights > 0]] == whole.ids[1:].tolist()
    for before, after in pairwise(parts):
        assert before.ids[-1] == after.ids[0], "the context of a piece's first learned token"
    assert parts[0].ids[0] == whole.ids[0]
    assert sum(chunk.dropped.values()) == 0
    assert chunk.remarks["longer than max_length, cut into pieces"] >= 1


def test_pieces_by_hand() -> None:
    ids, weights = np.arange(10, 17, dtype=np.int32), np.array([0, 1, 1, 1, 1, 1, 1], np.float32)
    cut = pieces(Encoded(ids, weights), 3)
    assert [part.ids.tolist() for part in cut] == [[10, 11, 12], [12, 13, 14], [14, 15, 16]]
    assert [part.weights.tolist() for part in cut] == [[0, 1, 1]] * 3
    assert [part.ids.tolist() for part in pieces(Encoded(ids, weights), 4)] == [[10, 11, 12, 13], [13, 14, 15, 16]]
    assert [part.ids.tolist() for part in pieces(Encoded(ids, weights), 6)] == [[10, 11, 12, 13, 14, 15], [15, 16]]


def test_raise_names_the_row(tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: has \d+ tokens, above data\.max_length=20"):
        encoder(tokenizer_folder, max_length=20, truncation_strategy="raise").encode([SHORT, LONG])


def test_samples_without_anything_to_learn_are_dropped(tokenizer_folder: Path) -> None:
    question_only = row(1, query="Q" * 50, response="A")
    chunk = encoder(tokenizer_folder, max_length=10, truncation_strategy="right").encode([question_only])
    assert not chunk.samples
    assert chunk.dropped == {"nothing to learn": 1}


def test_pretraining_takes_text_and_joins_the_turns_of_chats(tokenizer_folder: Path) -> None:
    made = encoder(tokenizer_folder, rows="documents")
    chunk = made.encode([row(text="some text"), SHORT])
    texts = [made.tokenizer.decode(sample.ids) for sample in chunk.samples]
    assert texts == ["some text<|im_end|>", "Q\nA<|im_end|>"]


def test_system_and_columns_reach_the_text(tokenizer_folder: Path) -> None:
    made = encoder(tokenizer_folder, system="S", columns={"ask": "query", "say": "response"})
    (sample,) = made.encode([row(ask="Q", say="A")]).samples
    assert made.tokenizer.decode(sample.ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ")


def test_pretraining_needs_an_end_of_text(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="has no eos_token"):
        encoder(tmp_path, rows="documents")


def test_control_tokens_in_a_document_are_text_unless_allowed(tokenizer_folder: Path) -> None:
    document = row(1, text="two<|im_end|>\n<|im_start|>plus")
    safe = encoder(tokenizer_folder, rows="documents")
    chunk = safe.encode([document, row(2, text="two plus")])
    assert [(sample.ids <= 2).sum() for sample in chunk.samples] == [1, 1]  # the end of the document alone
    assert safe.tokenizer.decode(chunk.samples[0].ids) == "two<|im_end|>\n<|im_start|>plus<|im_end|>"
    assert [count for name, count in chunk.remarks.items() if "control tokens" in name] == [1]
    (sample,) = encoder(tokenizer_folder, rows="documents", sanitize_control_tokens=False).encode([document]).samples
    assert sample.ids[-3:].tolist().count(2) == 1
    assert (sample.ids <= 2).sum() == 3
