"""Rows of every accepted shape → one list of chat messages.

| shape | fields |
| --- | --- |
| messages | `messages`: list of {role, content} |
| ShareGPT | `conversations`: list of {from, value} |
| alpaca | `instruction`, `input`, `output`, optional `history` |
| query/response | `query`, `response`, optional `history` |
| question/answer | `question`, `answer` |
| prompt/completion | `prompt`, `completion` |
| text | `text`: one assistant message, or the document of a pretraining run |

Every shape may carry `system`. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megabatch.errors import DataError
from megabatch.trainer.data.files import Row


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    loss: bool | None = None
    """Whether an assistant turn is learned; None leaves it to `loss_scale`."""


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
}

# Who may speak after whom; None is the start of a conversation.
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def messages_of(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> list[Message]:
    """The conversation of one row.

    Args: `columns`: field name in the dataset → accepted name, applied first; `system`: system message for rows
    that have none.
    Raises: DataError with the row's place for an unknown shape, a value of the wrong type, an empty assistant
    message, or roles out of order.
    """
    fields = {**row.fields}
    for old, new in (columns or {}).items():
        if old in fields:
            fields[new] = fields.pop(old)
    for required, convert in _SHAPES:
        if all(fields.get(name) is not None for name in required):
            found = convert(fields, row)
            break
    else:
        raise DataError(
            f"{row.origin}: no accepted format has the fields {_field_list(fields)}; accepted are {_shape_list()}; "
            f"rename fields with data.columns"
        )
    system = _text(fields, "system", row) if fields.get("system") else system
    if system and found[:1] and found[0].role != "system" and "text" not in required:
        found.insert(0, Message("system", system))
    _check(found, row)
    return found


def _from_messages(fields: Mapping[str, Any], row: Row) -> list[Message]:
    return _turns(fields["messages"], row, field="messages")


def _from_conversations(fields: Mapping[str, Any], row: Row) -> list[Message]:
    return _turns(fields["conversations"], row, field="conversations")


def _from_alpaca(fields: Mapping[str, Any], row: Row) -> list[Message]:
    extra = _text(fields, "input", row) if fields.get("input") else ""
    instruction = _text(fields, "instruction", row)
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    return [*_history(fields, row), Message("user", question), Message("assistant", _text(fields, "output", row))]


def _exchange(question: str, answer: str) -> Callable[[Mapping[str, Any], Row], list[Message]]:
    def convert(fields: Mapping[str, Any], row: Row) -> list[Message]:
        pair = [Message("user", _text(fields, question, row)), Message("assistant", _text(fields, answer, row))]
        return [*_history(fields, row), *pair]

    return convert


def _from_text(fields: Mapping[str, Any], row: Row) -> list[Message]:
    return [Message("assistant", _text(fields, "text", row))]


_SHAPES: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], Row], list[Message]]], ...] = (
    (("messages",), _from_messages),
    (("conversations",), _from_conversations),
    (("instruction", "output"), _from_alpaca),
    (("query", "response"), _exchange("query", "response")),
    (("question", "answer"), _exchange("question", "answer")),
    (("prompt", "completion"), _exchange("prompt", "completion")),
    (("text",), _from_text),
)


def _field_list(fields: Mapping[str, Any]) -> str:
    names = [f"{name!r} (null)" if fields[name] is None else repr(name) for name in sorted(fields)]
    return ", ".join(names) or "(none)"


def _shape_list() -> str:
    return ", ".join("+".join(required) for required, _ in _SHAPES)


def _turns(value: Any, row: Row, *, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.origin}: {field} must be a list of at least one message, not {_short(value)}")
    return [_turn(item, row, place=f"{field}[{index}]") for index, item in enumerate(value)]


def _turn(item: Any, row: Row, *, place: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{row.origin}: {place} must be an object with role and content, not {_short(item)}")
    role = item.get("role", item.get("from"))
    if item.get("tool_calls") or role in ("function_call", "tool_call"):
        raise DataError(f"{row.origin}: {place} calls a tool, which is not supported; write the call into its content")
    if role not in _ROLES:
        raise DataError(f"{row.origin}: {place} has the role {role!r}; accepted are {', '.join(_ROLES)}")
    content = item["content"] if "content" in item else item.get("value")
    if not isinstance(content, str):
        raise DataError(f"{row.origin}: {place}.content must be a string, not {_short(content)}")
    loss = item.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"{row.origin}: {place}.loss must be true or false, not {_short(loss)}")
    return Message(_ROLES[role], content, loss)


def _history(fields: Mapping[str, Any], row: Row) -> list[Message]:
    history = fields.get("history") or []
    well_formed = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not well_formed:
        raise DataError(f"{row.origin}: history must be a list of [query, response] pairs, not {_short(history)}")
    return [
        message for query, response in history for message in (Message("user", query), Message("assistant", response))
    ]


def _text(fields: Mapping[str, Any], name: str, row: Row) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: {name} must be a string, not {_short(value)}")
    return value


def _check(found: list[Message], row: Row) -> None:
    before: str | None = None
    for index, message in enumerate(found):
        if message.role not in _MAY_FOLLOW[before]:
            after = f"after {before}" if before else "at the start"
            raise DataError(
                f"{row.origin}: message {index} is of the {message.role}, out of order {after}; "
                f"expected {' or '.join(_MAY_FOLLOW[before])}"
            )
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"{row.origin}: message {index} of the assistant is empty; fill it or delete the row")
        if not _encodable(message.content):
            raise DataError(f"{row.origin}: message {index} holds half a surrogate pair, which is no text; delete it")
        before = message.role
    if before != "assistant":
        raise DataError(f"{row.origin}: the last message is of the {before}; it must be the assistant's to learn from")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '…'}"
