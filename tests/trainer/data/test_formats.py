from __future__ import annotations

from typing import Any

import pytest

from megabatch.errors import DataError
from megabatch.trainer.data.files import Origin, Row
from megabatch.trainer.data.formats import Message, messages_of


def row(**fields: Any) -> Row:
    return Row(Origin("train.jsonl", 7), fields)


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in pairs]


EXCHANGE = turns(("user", "Q"), ("assistant", "A"))
HISTORY = turns(("user", "q0"), ("assistant", "a0"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, EXCHANGE),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, EXCHANGE),
        ({"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, EXCHANGE),
        ({"instruction": "Q", "input": "", "output": "A"}, EXCHANGE),
        ({"instruction": "Q", "output": "A", "history": [["q0", "a0"]]}, HISTORY + EXCHANGE),
        ({"instruction": "Q", "input": "X", "output": "A"}, turns(("user", "Q\nX"), ("assistant", "A"))),
        ({"query": "Q", "response": "A"}, EXCHANGE),
        ({"query": "Q", "response": "A", "history": [["q0", "a0"]], "system": "S"},
         turns(("system", "S")) + HISTORY + EXCHANGE),
        ({"question": "Q", "answer": "A"}, EXCHANGE),
        ({"prompt": "Q", "completion": "A", "unrelated": 3}, EXCHANGE),
        ({"text": "T"}, turns(("assistant", "T"))),
        ({"messages": None, "query": "Q", "response": "A"}, EXCHANGE),
    ],
)  # fmt: skip
def test_accepted_shapes(fields: dict[str, Any], expected: list[Message]) -> None:
    assert messages_of(row(**fields)) == expected


def test_columns_rename_before_the_shape_is_recognised() -> None:
    renamed = {"problem": "query", "solution": "response", "absent": "text"}
    assert messages_of(row(problem="Q", solution="A"), columns=renamed) == EXCHANGE


def test_the_rows_own_system_message_wins() -> None:
    assert messages_of(row(query="Q", response="A"), system="D")[0] == Message("system", "D")
    assert messages_of(row(query="Q", response="A", system="S"), system="D")[0] == Message("system", "S")
    own = [{"role": "system", "content": "O"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert messages_of(row(messages=own, system="S"), system="D") == turns(("system", "O")) + EXCHANGE
    assert messages_of(row(text="T"), system="D") == turns(("assistant", "T"))


def test_a_message_may_carry_its_own_loss() -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss": False}]
    assert messages_of(row(messages=said))[1].loss is False


def chat(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ask": "Q", "reply": "A"}, "no accepted format has the fields 'ask', 'reply'; accepted are messages,"),
        ({"query": "Q", "response": 4}, "response must be a string, not int 4"),
        ({"query": "Q", "response": ""}, "message 1 of the assistant is empty"),
        ({"query": "Q", "response": " \n"}, "message 1 of the assistant is empty"),
        ({"query": "Q", "response": "A", "history": [["q"]]}, "history must be a list of"),
        ({"query": "\ud83d", "response": "A"}, "message 0 holds half a surrogate pair"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": "Q"}, "messages must be a list of at least one message, not str 'Q'"),
        ({"messages": ["Q"]}, r"messages\[0\] must be an object"),
        (chat(("user", "Q"), ("assistant", None)), r"messages\[1\]\.content must be a string, not NoneType"),
        (chat(("user", "Q"), ("assistant", [{"type": "text"}])), r"messages\[1\]\.content must be a string, not list"),
        (chat(("user", "Q"), ("robot", "A")), "has the role 'robot'; accepted are system"),
        (chat(("user", "Q"), ("user", "Q"), ("assistant", "A")), "message 1 is of the user, out of order after user"),
        (chat(("user", "Q"), ("system", "S"), ("assistant", "A")), "message 1 is of the system, out of order"),
        (chat(("tool", "Q"), ("assistant", "A")), "out of order at the start; expected system or user or assistant"),
        (chat(("user", "Q")), "the last message is of the user"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls a tool"),
    ],
)  # fmt: skip
def test_faults_name_file_line_and_fix(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^train\.jsonl:7: .*" + message):
        messages_of(row(**fields))
