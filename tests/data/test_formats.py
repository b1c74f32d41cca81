from __future__ import annotations

import json
from typing import Any

import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.formats import Message, conversation_of
from megabatch.errors import DataError


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
        ({"conversation": [{"human": "q0", "assistant": "a0"}, {"human": "Q", "assistant": "A"}]}, HISTORY + EXCHANGE),
        ({"conversation": [{"from": "user", "value": "Q"}, {"from": "bot", "value": "A"}], "system": "S"},
         turns(("system", "S")) + EXCHANGE),
        ({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'}, EXCHANGE),
        ({"query": "Q", "response": "A", "history": '[["q0", "a0"]]'}, HISTORY + EXCHANGE),
        ({"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
         EXCHANGE),
        ({"prompt": [{"role": "user", "content": "Q"}], "completion": "A"}, EXCHANGE),
        ({"messages": [{"role": "user", "content": "Q", "name": None, "tool_calls": None, "from": None},
                       {"role": "assistant", "content": "A", "value": None, "loss": None}]}, EXCHANGE),
        ({"messages": None, "query": "Q", "response": "A"}, EXCHANGE),
    ],
)  # fmt: skip
def test_accepted_shapes(fields: dict[str, Any], expected: list[Message]) -> None:
    assert conversation_of(row(**fields)).messages == expected


def test_columns_rename_before_the_shape_is_recognised() -> None:
    renamed = {"problem": "query", "solution": "response", "absent": "text"}
    assert conversation_of(row(problem="Q", solution="A"), columns=renamed).messages == EXCHANGE


def test_the_rows_own_system_message_wins() -> None:
    assert conversation_of(row(query="Q", response="A"), system="D").messages[0] == Message("system", "D")
    assert conversation_of(row(query="Q", response="A", system="S"), system="D").messages[0] == Message("system", "S")
    own = [{"role": "system", "content": "O"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert conversation_of(row(messages=own, system="S"), system="D").messages == turns(("system", "O")) + EXCHANGE
    assert conversation_of(row(text="T"), system="D").messages == turns(("assistant", "T"))


def test_a_message_may_carry_its_own_loss() -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss": False}]
    assert conversation_of(row(messages=said)).messages[1].loss == 0


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
        ({"messages": [{"role": "tool", "content": "Q", "tool_calls": ["f"]}]},
         r"messages\[0\]\.tool_calls must be a list of objects with name and arguments, not list"),
        (chat(("user", "Q"), ("assistant", None)), r"messages\[1\]\.content must be a string or a list of text parts"),
        (chat(("user", "Q"), ("assistant", [{"type": "text"}])), r"messages\[1\]\.content\[0\] must be a text part"),
        (chat(("user", [{"type": "image"}]), ("assistant", "A")), r"not of type 'image': a text model reads no other"),
        (chat(("user", "Q"), ("robot", "A")), "has the role 'robot'; accepted are system"),
        (chat(("user", "Q")), "the last message is from the user"),
        (chat(("user", "Q"), ("tool_call", "no JSON")), r"messages\[1\]\.content is not valid JSON"),
        (chat(("user", "Q"), ("tool_call", '{"f": 1}')), "must be JSON with the name and arguments of a call"),
        ({"messages": [{"role": "assistant", "content": "A", "loss": "yes"}]}, "loss must be true, false or a weight"),
        ({"messages": [{"role": "assistant", "content": "A", "loss": -1}]}, "loss must be true, false or a weight"),
        ({"messages": [{"role": "assistant", "content": "A", "loss": 10**400}]}, "loss must be true, false or a"),
        ({"messages": '[{"role": "user", "role": "user"}]'}, "messages is not valid JSON .the key 'role' stands"),
        ({"messages": '[{"x": ' + "1" * 5000 + "}]"}, "messages is not valid JSON .a number has too many digits"),
        ({"messages": [{"role": "assistant", "content": "A", "name": "\ud83d"}]}, "message 0 holds half a surrogate"),
        ({"query": "Q", "response": "A", "tools": [{"name": "\ud83d"}]}, "tools holds half a surrogate pair"),
        ({"query": "Q", "response": "A", "tools": "[{"}, "tools is not valid JSON"),
        ({"query": "Q", "response": "A", "tools": 3}, "tools must be a list of objects, not int 3"),
        ({"query": "Q", "response": "A", "documents": ["x"]}, "documents is not valid JSON"),
    ],
)  # fmt: skip
def test_faults_name_file_line_and_fix(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^train\.jsonl:7: .*" + message):
        conversation_of(row(**fields))


def test_of_a_conversational_prompt_nothing_is_learned() -> None:
    """As TRL counts it: the completion alone is learned, but for messages that ask for it themselves."""
    said = [
        {"role": "user", "content": "q0"},
        {"role": "assistant", "content": "a0"},
        {"role": "user", "content": "Q"},
    ]
    answer = [{"role": "assistant", "content": "A"}]
    found = conversation_of(row(prompt=said, completion=answer)).messages
    assert [m.loss for m in found] == [None, 0, None, None]
    asked = [said[0], {**said[1], "loss": True}, said[2]]
    assert conversation_of(row(prompt=asked, completion=answer)).messages[1].loss == 1


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({"loss": 0}, (0, None)), ({"loss": 1.0}, (1, None)), ({"loss": 0.25}, (0.25, None)), ({}, (None, None)),
        ({"loss": True, "loss_scale": 2.0}, (1, 2)), ({"loss_scale": 0.5}, (None, 0.5)), ({"weight": 0}, (0, None)),
        ({"train": False}, (0, None)), ({"loss": None}, (None, None)),
    ],
)  # fmt: skip
def test_numbers_weigh_a_turn(fields: dict[str, Any], weight: tuple[float | None, float]) -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", **fields}]
    message = conversation_of(row(messages=said)).messages[1]
    assert (message.loss, message.scale) == weight


def test_one_turn_has_one_loss() -> None:
    call = '{"name": "f", "arguments": {}}'
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss": False},
            {"role": "tool_call", "content": call}]  # fmt: skip
    with pytest.raises(DataError, match=r"^train\.jsonl:7: messages\[2\]: two messages .* their losses differ"):
        conversation_of(row(messages=said))
    same = [*said[:2], {**said[2], "loss": False}, said[2]]  # of calls in a row the first one counts
    assert [m.loss for m in conversation_of(row(messages=same)).messages] == [None, 0]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_calls_as_turns_of_their_own_join_the_assistants_turn() -> None:
    text = '{"name": "f", "arguments": {"x": 1}}'
    said = [("user", "Q"), ("assistant", "I look."), ("tool_call", text), ("tool_call", text), ("tool_response", "R"),
            ("tool", {"found": 1}), ("function-call", text), ("observation", "O"), ("assistant", "A")]  # fmt: skip
    found = conversation_of(row(**chat(*said)))
    assert found.is_agent
    assert [(m.role, m.content, len(m.fields.get("tool_calls", ()))) for m in found.messages] == [
        ("user", "Q", 0), ("assistant", "I look.", 2), ("tool", "R", 0), ("tool", '{"found": 1}', 0),
        ("assistant", "", 1), ("tool", "O", 0), ("assistant", "A", 0),
    ]  # fmt: skip
    assert found.messages[1].fields["tool_calls"] == [CALL, CALL]


def test_columns_are_kept_for_the_template() -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [CALL], "content": None}]
    tool = {"type": "function", "function": {"name": "f"}}
    for given in ([tool], json.dumps([tool]), [json.dumps(tool)], json.dumps(tool)):
        found = conversation_of(row(messages=said, tools=given, images=None, id=3))
        assert dict(found.columns) == {"tools": [tool], "id": 3}
    assert "tools" not in conversation_of(row(messages=said, tools="[]")).columns
    bare = [*said, {"role": "tool_call", "content": '{"name": "f"}'}]
    assert conversation_of(row(messages=bare, tools=[{"name": "f"}])).columns["tools"] == [tool]
