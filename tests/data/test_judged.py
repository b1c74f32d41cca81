"""Rows with labelled answers, up to the answers and their mismatched ones."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.judged import judged_of
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.judged import ALONE, CROWDED
from megabatch.errors import DataError


def row(number: int = 7, **fields: Any) -> Row:
    return Row(Origin("judged.jsonl", number), fields)


def encoder(folder: Path, **settings: Any) -> Encoder:
    how = {"rows": "judged", "loss_scale": "last_round", "mismatches": True, **settings}
    return Encoder(Encoding(tokenizer=folder, **how))


@pytest.mark.parametrize(("label", "good"), [
    (True, True), (False, False), (1, True), (0, False), (1.0, True),
    ("1", True), ("0", False), ("true", True), ("False", False), (" 1.0", True),
])  # fmt: skip
def test_a_conversation_with_a_label(label: Any, good: bool) -> None:
    """Texts are what CSV has."""
    (found,) = judged_of(row(prompt="Q", completion="A", label=label))
    assert (found.label, found.conversation.messages[-1].content) == (good, "A")
    assert not found.conversation.columns


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    found = judged_of(row(prompt="Q", chosen="good", rejected="bad"))
    assert [(one.label, one.conversation.messages[-1].content) for one in found] == [(True, "good"), (False, "bad")]
    (renamed,) = judged_of(row(question="Q", answer="A", right=0), columns={"right": "label"})
    assert renamed.label is False


@pytest.mark.parametrize("label", [None, "", "yes", 2, 0.5, [True], 10**400, float("nan")])
def test_faulty_labels_name_file_and_line(label: Any) -> None:
    rule = "has no label; give label" if label in (None, "") else "label must be true or false"
    with pytest.raises(DataError, match=rf"^judged\.jsonl:7: {rule}"):
        judged_of(row(prompt="Q", completion="A", label=label))


def test_an_empty_prompt_names_file_and_line() -> None:
    with pytest.raises(DataError, match=r"^judged\.jsonl:7: the prompt is empty; fill it or delete the row"):
        judged_of(row(query="\n", response="A", label=True))


def test_each_answer_is_followed_by_its_prompt_with_an_answer_to_another_one(tokenizer_folder: Path, bpe: Any) -> None:
    rows = [
        row(1, prompt="one", completion="two", label=True),
        row(2, prompt="three", chosen="four", rejected="five"),
        row(3, prompt="six", completion="seven", label=False),
    ]
    chunk = encoder(tokenizer_folder).encode(rows)
    assert chunk.items == [2, 4, 2]
    said = [bpe.decode(sample.ids[sample.weights > 0]).removesuffix("<|im_end|>") for sample in chunk.samples]
    assert said == ["two", "five", "four", "seven", "five", "two", "seven", "four"]
    asked = [bpe.decode(sample.ids[sample.weights == 0]) for sample in chunk.samples]
    assert [next(w for w in ("one", "three", "six") if w in text) for text in asked] == [
        "one", "one", "three", "three", "three", "three", "six", "six",
    ]  # fmt: skip
    assert [sample.columns["label"] for sample in chunk.samples] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert [sample.columns["matched"] for sample in chunk.samples] == [1, 0] * 4
    plain = encoder(tokenizer_folder, mismatches=False).encode(rows)
    assert plain.items == [1, 2, 1] and {sample.columns["matched"] for sample in plain.samples} == {1.0}


def test_mismatched_answers_are_to_another_prompt_wherever_there_is_one(tokenizer_folder: Path, bpe: Any) -> None:
    """Each answer of a block is that of one other; 40 blocks."""
    draw = random.Random(0)
    for _ in range(40):
        asked = [draw.choice("abcdefgh"[: draw.randint(1, 8)]) for _ in range(draw.randint(2, 20))]
        rows = [row(n, prompt=one, completion=f"{one}{n}", label=n % 2) for n, one in enumerate(asked)]
        chunk = encoder(tokenizer_folder).encode(rows)
        said = [bpe.decode(sample.ids[sample.weights > 0]).removesuffix("<|im_end|>") for sample in chunk.samples]
        own, other = said[::2], said[1::2]
        assert sorted(own) == sorted(other) and not any(a == b for a, b in zip(own, other, strict=True))
        same = sum(a[0] == b[0] for a, b in zip(own, other, strict=True))
        most = max(Counter(asked).values())
        assert same == max(0, 2 * most - len(asked)) == chunk.remarks[CROWDED], (own, other)


def test_a_long_mismatched_answer_drops_no_row(tokenizer_folder: Path) -> None:
    rows = [
        row(1, prompt="Q", completion="A", label=True),
        row(2, prompt="Q" * 9, completion="seven " * 9, label=False),
    ]
    whole = encoder(tokenizer_folder).encode(rows)
    limit = max(len(whole.samples[0].ids), len(whole.samples[2].ids))
    assert len(whole.samples[1].ids) <= limit < len(whole.samples[3].ids) + 100
    cut = encoder(tokenizer_folder, max_length=limit).encode(rows)
    assert cut.items == [2, 2] and not cut.dropped
    assert all(len(sample.ids) <= limit for sample in cut.samples)
    assert encoder(tokenizer_folder).encode(rows[:1]).remarks[ALONE] == 1
