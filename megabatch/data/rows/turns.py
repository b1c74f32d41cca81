"""One item of a list of messages → a turn: roles, contents, tool calls and loss in every accepted spelling.

| spelling | what it becomes |
| --- | --- |
| {role, content, …}, {from, value, …} | a turn; other fields go to the chat template, null ones are absent |
| {human, assistant}, {user, assistant} | two turns |
| content: [{type: text, text}, …] | the joined text; a template that reads parts gets the parts |
| role `tool_call`, `function_call` | a call of the assistant's turn before it, else of one of its own |
| role `tool_response`, `observation`, `function` | role `tool` |
| `loss`, `weight`, `train` | the weight of an assistant's turn in the loss; 0 or false: not learned |
| `loss_scale` | the weight of a learned turn, in place of what the run's scales give its parts |
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from megabatch.data.rows.numbers import is_number
from megabatch.data.rows.strict_json import JsonError, loads
from megabatch.errors import DataError
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `developer`, `user`, `assistant`, `tool` or `ipython`."""
    content: str
    """"" if the turn has none."""
    loss: float | None = None
    """Weight in the loss of an assistant turn; None leaves it to the run's `loss_scale`."""
    scale: float | None = None
    """Weight of an assistant turn where it is learned, in place of what the run's scales give its parts; None for
    those."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Other fields that a chat template may read: `tool_calls`, `reasoning_content`, `name`, …; none is None except
    `content`, which is here if a template should see another form of it: parts, or None for a turn that only calls."""


def as_mapping(message: Message) -> dict[str, Any]:
    """A turn as chat templates and rewards read it, with its content as text, "" where it has none."""
    return {**message.fields, "role": message.role, "content": message.content}


_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "ipython": "ipython",
    "observation": "tool",
    "observations": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
_CALLS = ("tool_call", "function_call")
_PAIRS = (("human", "assistant"), ("user", "assistant"))
SAYING = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Fields with which a turn says something even without content."""
_SAID = ("content", "value")
_LOSS = ("loss", "weight", "train")
_PARSED = {"role", "from", *_SAID, *_LOSS, "loss_scale"}
_SIMPLE = {"role", "content"}


@dataclass(frozen=True, slots=True)
class Turns:
    """The turns of one list."""

    messages: list[Message]
    is_agent: bool = False
    """Whether calls are separate turns, as in ms-swift and ShareGPT; we then join the assistant's adjacent turns."""


def turns_of(value: Any, *, place: str) -> Turns:
    """The turns of a list of messages, or of its JSON text; `place` names it in errors. Raises: DataError."""
    value = from_json(value, place=place) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
    if not isinstance(value, list) or not value:
        raise DataError(f"{place} must be a list of at least one message, not {short(value)}")
    made: list[Message] = []
    is_agent = False
    for index, given in enumerate(value):
        where = f"{place}[{index}]"
        item = from_json(given, place=where) if isinstance(given, str) and given.lstrip()[:1] == "{" else given
        if not isinstance(item, dict):
            raise DataError(f"{where} must be an object with role and content, not {short(item)}")
        if _role(item).replace("-", "_") in _CALLS:
            _add_call(made, item, place=where)
            is_agent = True
        else:
            made.extend(_messages(item, place=where))
    if not is_agent:
        return Turns(made)
    try:
        return Turns(neighbours_joined(made, roles=("assistant",)), is_agent=True)
    except DataError as e:
        raise DataError(f"{place}: {e}") from e


def said_as_list(value: Any, *, place: str) -> Any:
    """Messages that stand as JSON text, as in CSV, as their list; everything else, such as an answer that is JSON, as
    it is. Raises: DataError for messages with a key twice."""
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_messages = isinstance(found, list) and bool(found) and all(map(_is_message, found))
    return from_json(value, place=place) if are_messages else value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(_role(value)) and any(name in value for name in (*_SAID, "tool_calls"))


def from_json(text: str, *, place: str) -> Any:
    """The value that a JSON text holds. Raises: DataError."""
    try:
        return loads(text)
    except JsonError as e:
        raise DataError(f"{place} is not valid JSON ({e}): {short(text)}") from e


def short(value: Any) -> str:
    """Type and beginning of a value, for errors."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '…'}"


def joined(first: Message, second: Message) -> Message:
    """Joins two adjacent turns of one role: concatenates their texts and calls.

    Raises: DataError if their loss weights differ, unless the first has calls: then its weight counts.
    """
    weights = (first.loss, first.scale), (second.loss, second.scale)
    if weights[0] != weights[1] and not first.fields.get("tool_calls"):
        raise DataError(
            f"two messages of the {first.role} in a row become one turn, but their losses differ: give both the "
            f"same, or put a message between them"
        )
    fields = {**first.fields, **second.fields}
    fields.pop("content", None)
    calls = [*first.fields.get("tool_calls", ()), *second.fields.get("tool_calls", ())]
    if calls:
        fields["tool_calls"] = calls
        fields |= {} if first.content or second.content else {"content": None}
    return replace(first, content=first.content + second.content, fields=fields)


def neighbours_joined(messages: Sequence[Message], *, roles: Collection[str]) -> list[Message]:
    """The turns, with adjacent turns of the same role joined, for these roles."""
    made: list[Message] = []
    for message in messages:
        if made and made[-1].role == message.role and message.role in roles:
            made[-1] = joined(made[-1], message)
        else:
            made.append(message)
    return made


def _role(item: Mapping[str, Any]) -> str:
    role = item.get("role") or item.get("from")
    return role if isinstance(role, str) else ""


def _messages(item: Mapping[str, Any], *, place: str) -> list[Message]:
    if item.keys() == _SIMPLE and isinstance(item["content"], str) and item["role"] in _ROLES:  # nearly all there are
        return [Message(_ROLES[item["role"]], item["content"])]
    for names in _PAIRS:
        if not _role(item) and all(name in item for name in names):
            loss, scale = _loss(item, place=place)
            said = [_text(item[name], place=f"{place}.{name}") for name in names]
            return [Message("user", said[0]), Message("assistant", said[1], loss, scale)]
    return [_message(item, place=place)]


def _message(item: Mapping[str, Any], *, place: str) -> Message:
    role = _ROLES.get(_role(item).replace("-", "_"))
    if role is None:
        named = item.get("role") or item.get("from")
        raise DataError(f"{place} has the role {named!r}; accepted are {', '.join([*_ROLES, *_CALLS])}")
    fields = {name: value for name, value in item.items() if value is not None and name not in _PARSED}
    if role != "assistant":
        for name in ("tool_calls", "function_call"):
            if not fields.get(name):
                fields.pop(name, None)
        if calls := fields.get("tool_calls"):
            fields["tool_calls"] = _calls(calls, place=f"{place}.tool_calls")
    elif calls := fields.pop("tool_calls", None) or fields.pop("function_call", None):
        fields["tool_calls"] = _calls(calls, place=f"{place}.tool_calls")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if isinstance(content, list):
        fields["content"] = content
    if content is None and any(fields.get(name) for name in SAYING):
        content = ""
        fields["content"] = None
    elif role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    return Message(role, _text(content, place=f"{place}.content"), *_loss(item, place=place), fields)


def _text(content: Any, *, place: str) -> str:
    """A content as text: the content itself, or its text parts concatenated."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{place} must be a string or a list of text parts, not {short(content)}")
    texts = []
    for index, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            what = f"of type {kind!r}" if kind else short(part)
            raise DataError(
                f"{place}[{index}] must be a text part {{'type': 'text', 'text': …}}, not {what}: a text model reads "
                f"no other; drop that part or the row"
            )
        texts.append(text)
    return "".join(texts)


def _calls(value: Any, *, place: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, without null keys."""
    value = from_json(value, place=place) if isinstance(value, str) else value
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{place} must be a list of objects with name and arguments, not {short(value)}")
    return [_without_nulls(call) for call in calls]


def _without_nulls(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call without its null keys; nulls inside the arguments stay."""
    kept = {name: value for name, value in call.items() if value is not None}
    if isinstance(kept.get("function"), dict):
        kept["function"] = {name: value for name, value in kept["function"].items() if value is not None}
    return kept


def _add_call(made: list[Message], item: Mapping[str, Any], *, place: str) -> None:
    """Adds a call to the assistant's turn before it, which may have calls already, or as a turn of its own."""
    content = item.get("content") if item.get("content") is not None else item.get("value")
    where = f"{place}.content"
    parsed = from_json(content, place=where) if isinstance(content, str) else content
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f"{where} must be JSON with the name and arguments of a call, not {short(content)}")
        arguments = inner.get("arguments", inner.get("parameters"))
        arguments = {} if arguments is None else arguments
        calls.append({"type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    turn = Message("assistant", "", *_loss(item, place=place), {"tool_calls": calls, "content": None})
    if made and made[-1].role == "assistant":
        try:
            made[-1] = joined(made[-1], turn)
        except DataError as e:
            raise DataError(f"{place}: {e}") from e
    else:
        made.append(turn)


def _loss(item: Mapping[str, Any], *, place: str) -> tuple[float | None, float | None]:
    """(the message's own loss weight or None, its scale or None)."""
    given = [value for name in _LOSS if (value := _weight(item, name, place=place)) is not None]
    return math.prod(given) if given else None, _weight(item, "loss_scale", place=place)


def _weight(item: Mapping[str, Any], name: str, *, place: str) -> float | None:
    value = item.get(name)
    if value is None:
        return None
    if not isinstance(value, bool) and (not is_number(value) or value < 0):
        raise DataError(f"{place}.{name} must be true, false or a weight of at least 0, not {short(value)}")
    return float(value)
