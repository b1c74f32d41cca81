"""Rows of every accepted shape → a conversation: chat messages, and the columns that a chat template may read.

| shape | fields |
| --- | --- |
| messages | `messages`: list of {role, content, …}, or its JSON text |
| ShareGPT | `conversations` or `conversation`: the same, or lists of {from, value} or {human, assistant} |
| alpaca | `instruction`, `input`, `output`, optional `history` |
| query/response | `query`, `response`, optional `history` |
| question/answer | `question`, `answer` |
| prompt/completion | `prompt`, `completion`: texts, or lists of messages of which the completion's are learned |
| text | `text`: one assistant message, or the document of a pretraining run |

Every shape may carry `system`, `tools`, `documents` and whatever else a template reads. `turns` says what a message
may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.turns import SAYING, Message, Turns, from_json, said_as_list, short, turns_of
from megabatch.errors import DataError
from megabatch.values import dataclass

__all__ = ["Conversation", "Message", "channel_of", "conversation_of", "is_text", "renamed"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The conversation in one row."""

    messages: list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, without null ones: `tools`, `documents`, … JSON texts of those two are parsed."""
    is_agent: bool = False
    """See `Turns`."""


def conversation_of(
    row: Row,
    *,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    answered: bool = True,
    also: Collection[str] = (),
) -> Conversation:
    """The conversation of one row.

    Args: `columns`: field name in the dataset → accepted name, applied first; `system`: system message for rows
    that have none; `answered`: the assistant must have said something; False also takes a question alone; `also`:
    further fields that the caller reads.
    Raises: DataError with the row's place for an unknown shape, a value of the wrong type, an empty assistant
    message, or no message of the assistant.
    """
    fields = renamed(row, columns)
    for required, optional, convert in _SHAPES:  # noqa: B007 - used below
        if all(fields.get(name) is not None for name in (required if answered else required[:1])):
            turns = convert(fields, row)
            break
    else:
        raise DataError(
            f"{row.origin}: no accepted format has the fields {_field_list(fields)}; accepted are {_shape_list()}; "
            f"rename fields with data.columns"
        )
    messages = turns.messages
    system = _text(fields, "system", row) if fields.get("system") else system
    if "text" not in required:
        messages[:] = with_system(messages, system)
    _check(messages, row, answered=answered)
    used = {*required, *optional, "system", *also}
    rest = {name: value for name, value in fields.items() if value is not None and name not in used}
    return Conversation(messages, _columns(rest, row, is_agent=turns.is_agent), turns.is_agent)


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The turns, behind this system message where there is one and they have none."""
    own = bool(messages) and messages[0].role in ("system", "developer")
    return [*messages] if own or not system else [Message("system", system), *messages]


def renamed(row: Row, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """A row's fields under the names that `data.columns` gives them."""
    fields = {**row.fields}
    for old, new in (columns or {}).items():
        if old in fields:
            fields[new] = fields.pop(old)
    return fields


def channel_of(row: Row, *, columns: Mapping[str, str] | None = None) -> str:
    """The value of a row's column `channel`; "None" if it has none. Raises: DataError for a value that is no name."""
    channel = renamed(row, columns).get("channel")
    if channel is not None and (not isinstance(channel, str | int) or not is_text(channel)):
        raise DataError(f"{row.origin}: channel must be a text or a whole number, not {short(channel)}")
    return str(channel)


def _turns(name: str) -> Callable[[Mapping[str, Any], Row], Turns]:
    return lambda fields, row: turns_of(fields[name], place=f"{row.origin}: {name}")


def _alpaca(fields: Mapping[str, Any], row: Row) -> Turns:
    extra = _text(fields, "input", row) if fields.get("input") else ""
    instruction = _text(fields, "instruction", row)
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    return Turns([*_history(fields, row), Message("user", question), *_answer(fields, "output", row)])


def _exchange(question: str, answer: str) -> Callable[[Mapping[str, Any], Row], Turns]:
    def convert(fields: Mapping[str, Any], row: Row) -> Turns:
        asked = Message("user", _text(fields, question, row))
        return Turns([*_history(fields, row), asked, *_answer(fields, answer, row)])

    return convert


def _answer(fields: Mapping[str, Any], name: str, row: Row) -> list[Message]:
    """The assistant's turn; none where the caller takes a question alone and the row has no more."""
    return [] if fields.get(name) is None else [Message("assistant", _text(fields, name, row))]


def _prompt(fields: Mapping[str, Any], row: Row) -> Turns:
    """Texts, or TRL's conversational form: the prompt is not trained on unless one of its messages asks for it."""
    prompt, completion = (
        said_as_list(fields.get(name), place=f"{row.origin}: {name}") for name in ("prompt", "completion")
    )
    if isinstance(prompt, str) and isinstance(completion, str | None):
        return _exchange("prompt", "completion")(fields, row)
    before = _spoken(prompt, "user", place=f"{row.origin}: prompt")
    if completion is None:
        return before
    after = _spoken(completion, "assistant", place=f"{row.origin}: completion")
    given = [replace(m, loss=0.0) if m.role == "assistant" and m.loss is None else m for m in before.messages]
    return Turns([*given, *after.messages], before.is_agent or after.is_agent)


def _spoken(value: Any, role: str, *, place: str) -> Turns:
    if isinstance(value, str):
        return Turns([Message(role, value)])
    return turns_of([value] if isinstance(value, dict) else value, place=place)


def _document(fields: Mapping[str, Any], row: Row) -> Turns:
    return Turns([Message("assistant", _text(fields, "text", row))])


_SHAPES: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any], Row], Turns]], ...] = (
    (("messages",), (), _turns("messages")),
    (("conversations",), (), _turns("conversations")),
    (("conversation",), (), _turns("conversation")),
    (("instruction", "output"), ("input", "history"), _alpaca),
    (("query", "response"), ("history",), _exchange("query", "response")),
    (("question", "answer"), ("history",), _exchange("question", "answer")),
    (("prompt", "completion"), ("history",), _prompt),
    (("text",), (), _document),
)


def _field_list(fields: Mapping[str, Any]) -> str:
    names = [f"{name!r} (null)" if fields[name] is None else repr(name) for name in sorted(fields)]
    return ", ".join(names) or "(none)"


def _shape_list() -> str:
    return ", ".join("+".join(required) for required, _, _ in _SHAPES)


def _history(fields: Mapping[str, Any], row: Row) -> list[Message]:
    place = f"{row.origin}: history"
    history = fields.get("history") or []
    history = from_json(history, place=place) if isinstance(history, str) else history
    well_formed = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not well_formed:
        raise DataError(f"{place} must be a list of [query, response] pairs, not {short(history)}")
    return [
        message for query, response in history for message in (Message("user", query), Message("assistant", response))
    ]


def _text(fields: Mapping[str, Any], name: str, row: Row) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: {name} must be a string, not {short(value)}")
    return value


def _columns(rest: dict[str, Any], row: Row, *, is_agent: bool) -> dict[str, Any]:
    for name in ("tools", "documents", "chat_template_kwargs"):
        value, place = rest.get(name), f"{row.origin}: {name}"
        if value is None:
            continue
        if isinstance(value, str):
            value = from_json(value, place=place) if value.strip() else None
        if name != "chat_template_kwargs":
            value = _objects(value, place=place)
        elif value is not None and not isinstance(value, dict):
            raise DataError(f"{place} must be an object of template variables, not {short(value)}")
        if not value:
            del rest[name]
            continue
        if not is_text(value):
            raise DataError(f"{place} holds half a surrogate pair, which is not valid text; delete it")
        rest[name] = [_wrapped(tool) for tool in value] if name == "tools" and is_agent else value
    return rest


def _objects(value: Any, *, place: str) -> list[Any]:
    """A list of objects; each may be JSON text."""
    items = [] if value is None else [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise DataError(f"{place} must be a list of objects, not {short(value)}")
    items = [from_json(item, place=place) if isinstance(item, str) else item for item in items]
    if faulty := [item for item in items if not isinstance(item, dict)]:
        raise DataError(f"{place} must be a list of objects, not of {short(faulty[0])}")
    return items


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as templates expect it; ms-swift and ShareGPT also write the bare function."""
    return tool if "function" in tool or "type" in tool else {"type": "function", "function": tool}


def _check(messages: list[Message], row: Row, *, answered: bool) -> None:
    for index, message in enumerate(messages):
        if message.role == "assistant" and not _says_something(message) and message.loss != 0:
            raise DataError(f"{row.origin}: message {index} of the assistant is empty; fill it or delete the row")
        if not is_text(message.content) or (message.fields and not is_text(message.fields)):
            raise DataError(
                f"{row.origin}: message {index} holds half a surrogate pair, which is not valid text; delete it"
            )
    if answered and not any(message.role == "assistant" for message in messages):
        raise DataError(
            f"{row.origin}: the last message is from the {messages[-1].role}; there must be an assistant message "
            f"to train on"
        )


def require_question(conversation: Conversation, row: Row) -> None:
    """Raises: DataError with the row's place where nobody says anything before the last answer, though turns do stand
    there: an answer to nothing has nothing to be better or worse at. A tool may have found nothing."""
    before = list(conversation.messages)
    while before and before[-1].role == "assistant":
        before.pop()
    first = next((n for n in range(len(before), 0, -1) if before[n - 1].role == "assistant"), 0)
    asking = [one for one in before[first:] if one.role not in ("system", "developer")]
    if asking and not any(one.content.strip() or one.role in ("tool", "ipython") for one in asking):
        raise DataError(f"{row.origin}: the prompt is empty; fill it or delete the row")


def require_words(conversation: Conversation, row: Row, name: str) -> None:
    """Raises: DataError with the row's place where nobody says anything, or what is said cannot be encoded."""
    _check(conversation.messages, row, answered=False)
    if not any(_says_something(message) for message in conversation.messages):
        raise DataError(f"{row.origin}: {name} say nothing; fill them or delete the row")


def _says_something(message: Message) -> bool:
    return bool(message.content.strip()) or any(message.fields.get(name) for name in SAYING)


def is_text(value: Any) -> bool:
    """Whether every string in it, at any depth, can be encoded: half a surrogate pair cannot."""
    if isinstance(value, str):
        try:
            return value.isascii() or bool(value.encode()) or not value
        except UnicodeEncodeError:
            return False
    if isinstance(value, Mapping):
        return all(is_text(key) and is_text(item) for key, item in value.items())
    return all(map(is_text, value)) if isinstance(value, (list, tuple)) else True
