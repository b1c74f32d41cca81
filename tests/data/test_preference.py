"""Rows with a good and a bad answer, up to the pairs of samples in a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.preference import is_preference, preference_of
from megabatch.data.rows.sources import resolve
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.pairs import EQUAL
from megabatch.errors import DataError


def row(**fields: Any) -> Row:
    return Row(Origin("pairs.jsonl", 7), fields)


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation of these texts, which the user begins."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


SHAPES: dict[str, dict[str, Any]] = {
    "messages, rejected_response": {"messages": said("Q", "good"), "rejected_response": "bad"},
    "messages, rejected_messages": {"messages": said("Q", "good"), "rejected_messages": said("Q", "bad")},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
        "rejected_response": "bad",
    },
    "query, response": {"query": "Q", "response": "good", "rejected_response": "bad"},
    "alpaca": {"instruction": "Q", "input": "", "output": "good", "rejected_response": "bad"},
    "texts": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "lists": {"prompt": said("Q"), "chosen": answer("good"), "rejected": answer("bad")},
    "implicit prompt": {"chosen": said("Q", "good"), "rejected": said("Q", "bad")},
    "whole conversations with their prompt": {
        "prompt": "Q",
        "chosen": said("Q", "good"),
        "rejected": said("Q", "bad"),
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_accepted_shapes(shape: str) -> None:
    given = row(**SHAPES[shape], margin=None)
    pair = preference_of(given)
    for conversation, expected in ((pair.chosen, "good"), (pair.rejected, "bad")):
        assert [(m.role, m.content) for m in conversation.messages] == [("user", "Q"), ("assistant", expected)]
        assert not conversation.columns
    assert pair.margin == 0.0
    assert is_preference(given)


def test_turns_before_the_answer_system_and_columns_are_of_both() -> None:
    whole = row(question=said("Q", "A", "Q2", "good"), rejected_response="bad", tools='[{"name": "f"}]', margin=2)
    pair = preference_of(whole, columns={"question": "messages"}, system="S")
    assert [m.content for m in pair.rejected.messages] == ["S", "Q", "A", "Q2", "bad"]
    assert pair.chosen.columns == pair.rejected.columns == {"tools": [{"name": "f"}]}
    assert pair.margin == 2.0
    implicit = preference_of(row(chosen=said("Q", "A", "Q2", "good"), rejected=said("Q", "A", "Q2", "bad")))
    assert [m.loss for m in implicit.chosen.messages] == [None, 0.0, None, None], "a turn of the prompt is not learned"


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"messages": said("Q", "A")}, "has no rejected answer; give rejected_response"),
    "two": (
        SHAPES["texts"] | {"rejected_response": "X"},
        "has rejected and rejected_response, of which",
    ),
    "no chosen": ({"prompt": "Q", "rejected": "bad"}, "rejected needs chosen beside it"),
    "no prompt": ({"chosen": "good", "rejected": "bad"}, "are answers without a prompt"),
    "empty text": (
        {"prompt": "Q", "chosen": "good", "rejected": " "},
        r"is empty.*conversation of rejected",
    ),
    "empty chosen": ({"prompt": "Q", "chosen": "", "rejected": "bad"}, r"is empty.*conversation of chosen"),
    "empty response": ({"query": "Q", "response": "A", "rejected_response": ""}, "must be a text that is not empty"),
    "empty prompt": (SHAPES["texts"] | {"prompt": " "}, "the prompt is empty; fill it or delete the row"),
    "empty query": ({"system": "S", "query": "", "response": "A", "rejected_response": "B"}, "the prompt is empty"),
    "empty last question": ({"messages": said("Q", "A", "", "B"), "rejected_response": "C"}, "the prompt is empty"),
    "list": (
        {"query": "Q", "response": "A", "rejected_response": ["bad"]},
        "must be a text that is not empty, not",
    ),
    "other prompt": ({"messages": said("Q", "A"), "rejected_messages": said("R", "B")}, "follow the same prompt"),
    "nothing shared": ({"chosen": said("Q", "A"), "rejected": said("R", "B")}, "must begin with one prompt"),
    "mixed": ({"chosen": said("Q", "A"), "rejected": 3}, "rejected must be a list of messages, as the other is"),
    "alone": ({"query": "Q", "response": "A", "rejected_messages": said("Q", "B")}, "needs messages beside it"),
    "no answer": ({"messages": said("Q"), "rejected_response": "bad"}, "there must be an assistant message"),
    "nan": (SHAPES["texts"] | {"margin": float("nan")}, "margin must be a finite number, not float nan"),
    "half a reference": (SHAPES["texts"] | {"ref_chosen_logps": -1.0}, "has ref_chosen_logps alone"),
    "no log-probability": (
        SHAPES["texts"] | {"ref_chosen_logps": -1.0, "ref_rejected_logps": 0.5},
        "are log-probabilities, and not above 0",
    ),
    "nan reference": (
        SHAPES["texts"] | {"ref_chosen_logps": float("nan"), "ref_rejected_logps": -1.0},
        "ref_chosen_logps must be a finite number, not float nan",
    ),
    "text margin": (SHAPES["texts"] | {"margin": "2"}, "margin must be a finite number, not str '2'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_and_line(fault: str) -> None:
    fields, message = FAULTS[fault]
    with pytest.raises(DataError, match=rf"^pairs\.jsonl:7: .*{message}"):
        preference_of(row(**fields))


def encoder(folder: Path, **settings: Any) -> Encoder:
    return Encoder(Encoding(tokenizer=folder, rows="pairs", loss_scale="last_round", **settings))


def test_a_pair_is_an_item_with_the_chosen_answer_first(tokenizer_folder: Path, bpe: Any) -> None:
    given = row(messages=said("two", "four", "six", "seven apples"), rejected_response="ten", margin=1.5)
    chunk = encoder(tokenizer_folder).encode([given])
    assert chunk.items == [2]
    learned = [bpe.decode(sample.ids[sample.weights > 0]) for sample in chunk.samples]
    assert learned == ["seven apples<|im_end|>", "ten<|im_end|>"]
    shared = int(chunk.samples[0].weights.argmax()) - 1
    assert [dict(s.columns) for s in chunk.samples] == [
        {"chosen": 1, "margin": 1.5, "shared": 0},
        {"chosen": 0, "margin": 1.5, "shared": shared},
    ]
    prompts = [sample.ids[sample.weights == 0].tolist() for sample in chunk.samples]
    assert prompts[0][:-1] == prompts[1][:-1], "but for what the template writes behind the answer"


def test_a_reference_s_log_probabilities_are_kept_where_they_are_read(tokenizer_folder: Path) -> None:
    told = row(prompt="Q", chosen="good", rejected="bad", ref_chosen_logps=-2, ref_rejected_logps=-3.5)
    untold = row(prompt="Q", chosen="good", rejected="bad")
    chunk = encoder(tokenizer_folder, ref_log_probs=True).encode([told, untold])
    found = [sample.columns["reference"] for sample in chunk.samples]
    assert found[:2] == [-2, -3.5] and np.isnan(found[2:]).all()
    assert "reference" not in encoder(tokenizer_folder).encode([told]).samples[0].columns
    assert not +chunk.remarks


def test_equal_answers_are_counted(tokenizer_folder: Path) -> None:
    same = row(prompt="Q", chosen="good", rejected="good")
    whole = row(chosen=said("Q", "good"), rejected=said("Q", "good"))
    chunk = encoder(tokenizer_folder).encode([same, row(prompt="Q", chosen="good", rejected="bad"), whole])
    assert (chunk.items, chunk.remarks[EQUAL]) == ([2], 2)
    assert str(chunk.first[EQUAL]) == "pairs.jsonl:7"


@pytest.mark.parametrize("strategy", ["delete", "left", "right", "raise"])
def test_an_answer_beyond_the_limit(tokenizer_folder: Path, strategy: Any) -> None:
    long = row(prompt="Q " * 30, chosen="A", rejected="B")
    made = encoder(tokenizer_folder, max_length=20, truncation_strategy=strategy)
    if strategy == "raise":
        with pytest.raises(DataError, match=r"pairs\.jsonl:7: has \d+ tokens, above data\.max_length=20"):
            made.encode([long])
        return
    chunk = made.encode([long])
    reasons = {"delete": {"longer than max_length": 1}, "right": {"nothing to learn": 1}, "left": {}}
    assert chunk.dropped == reasons[strategy]
    assert chunk.items == ([2] if strategy == "left" else [])


def test_half_a_pair_without_answer_is_no_pair(tokenizer_folder: Path) -> None:
    long = encoder(tokenizer_folder).encode([row(prompt="Q", chosen="A", rejected="seven " * 40)])
    cut = len(long.samples[0].ids)
    made = encoder(tokenizer_folder, max_length=cut - 3, truncation_strategy="left")
    assert made.encode([row(prompt="Q", chosen="A", rejected="seven " * 40)]).items == [2]
    right = encoder(tokenizer_folder, max_length=cut - 4, truncation_strategy="right")
    assert right.encode([row(prompt="Q", chosen="A", rejected="seven " * 40)]).dropped == {"nothing to learn": 1}


def test_pairs_through_the_cache(tokenizer_folder: Path, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {"prompt": f"What is {n} + 1?", "chosen": str(n + 1), "rejected": str(n), "margin": n / 2} for n in range(9)
    ]
    path = write_jsonl("pairs.jsonl", rows)
    settings = Encoding(tokenizer=tokenizer_folder, rows="pairs", loss_scale="last_round")
    cache = TokenCache.open(TokenCache.build(resolve([str(path)]), settings, cache_dir=tmp_path / "cache"))
    assert np.diff(cache.items).tolist() == [2] * 9
    assert [cache[index].columns["margin"] for index in (0, 1, 16, 17)] == [0.0, 0.0, 4.0, 4.0]
    assert [cache[index].columns["chosen"] for index in (0, 1, 16, 17)] == [1.0, 0.0, 1.0, 0.0]
    assert str(cache.origin(17)) == f"{path}:9"
