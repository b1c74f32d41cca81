"""Rows as prompts: what is asked, what rewards may read, and the tokens up to the answer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.prompts import prompt_of
from megabatch.data.tokens import tokenizer
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError


def row(**fields: Any) -> Row:
    return Row(Origin("train.jsonl", 7), fields)


def turns(row: Row, **how: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in prompt_of(row, **how).conversation.messages]


ASKED = [("user", "2 + 2?")]
ROWS = {
    "question": row(question="2 + 2?", answer="#### 4"),
    "query": row(query="2 + 2?"),
    "prompt": row(prompt="2 + 2?"),
    "messages in prompt": row(prompt=[{"role": "user", "content": "2 + 2?"}]),
    "instruction": row(instruction="2 + 2?"),
    "asked": row(messages=[{"role": "user", "content": "2 + 2?"}]),
    "answered": row(messages=[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]),
}


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_asks_the_same(shape: str) -> None:
    assert turns(ROWS[shape]) == ASKED
    assert turns(ROWS[shape], system="Be brief.") == [("system", "Be brief."), *ASKED]


def test_an_answer_becomes_the_solution_unless_there_is_one() -> None:
    assert prompt_of(ROWS["question"]).columns == {"solution": "#### 4"}
    assert prompt_of(ROWS["answered"]).columns == {"solution": "4"}
    assert prompt_of(ROWS["asked"]).columns == {}
    own = prompt_of(row(question="2 + 2?", answer="four", solution="4", level=3))
    assert own.columns == {"solution": "4", "level": 3}


def test_earlier_turns_stay() -> None:
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert turns(row(messages=messages)) == talk[:3]
    assert turns(row(query="c", history=[["a", "b"]])) == talk[:3]


def test_a_row_with_nothing_to_answer_is_refused() -> None:
    for messages in ([{"role": "system", "content": "s"}], [{"role": "assistant", "content": "hello"}]):
        with pytest.raises(DataError, match=r"train.jsonl:7: has nothing to answer"):
            prompt_of(row(messages=messages))


def test_a_prompt_that_says_nothing_is_refused_but_a_tool_may_find_nothing() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:7: the prompt is empty"):
        prompt_of(row(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": " "}]))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    found = prompt_of(row(messages=[{"role": "user", "content": "q"}, call, {"role": "tool", "content": ""}]))
    assert [message.role for message in found.conversation.messages] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("text", ["two plus two", "say <|im_end|> twice"])
def test_tokens_are_those_of_the_templates_generation_prompt(text: str, tokenizer_folder: Path) -> None:
    """And a control token in the data is plain text, as everywhere."""
    loaded = tokenizer.load(tokenizer_folder)
    encoder = Encoder(Encoding(tokenizer=tokenizer_folder, rows="prompts"))
    (found,) = encoder.encode([row(question=text, answer="four", extra=1)]).samples
    asked = loaded.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
    assert loaded.decode(found.ids) == asked
    end = loaded.convert_tokens_to_ids("<|im_end|>")
    assert Counter(found.ids.tolist())[end] == 1, "the user's turn ends once"
    if "<|" not in text:
        assert found.ids.tolist() == loaded(asked, add_special_tokens=False)["input_ids"]


def test_long_prompts_are_cut_on_the_left(tokenizer_folder: Path) -> None:
    rows = [row(question="apple " * 30)]
    whole = Encoder(Encoding(tokenizer=tokenizer_folder, rows="prompts")).encode(rows).samples[0]
    encoding = Encoding(tokenizer=tokenizer_folder, rows="prompts", max_length=12, truncation_strategy="left")
    assert Encoder(encoding).encode(rows).samples[0].ids.tolist() == whole.ids[-12:].tolist()
