"""A conversation as one chat template reads it: which fields and columns it uses, and in which form.

Nothing that the template does not read is dropped silently: we refuse what should have changed the text and count the
rest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation
from megabatch.data.rows.turns import Message, from_json, neighbours_joined
from megabatch.data.tokens.rendering import Renderer
from megabatch.errors import DataError

_REASONING = ("reasoning_content", "thinking", "reasoning")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio", "objects")
_SPOKEN = {"tools": "functions that may be called", "documents": "documents to answer from"}
_HARMLESS = frozenset(
    {"id", "idx", "index", "uuid", "key", "hash", "source", "dataset", "subset", "split", "lang", "language", "url"}
    | {"category", "categories", "domain", "topic", "task", "tags", "meta", "metadata", "license", "title", "date"}
    | {"time", "timestamp", "created", "created_at", "updated_at", "author", "user_id", "conversation_id", "chat_id"}
    | {"session_id", "model", "model_name", "score", "scores", "quality", "length", "num_tokens", "num_turns"}
    | {"channel", "name", "type", "tool_call_id", "refusal", "annotations"}
)
"""Columns and fields that only describe a row or a turn; a template that reads one still gets it."""
_PROBE = "megabatch"

Fitted = tuple[list[Message], list[dict[str, Any]]]
"""Turns, and the same turns in the form that a template reads."""


class Fitting:
    """Prepares conversations for one template."""

    def __init__(self, renderer: Renderer, *, advice: str, variables: Mapping[str, Any]) -> None:
        """`advice`: what the user can do if the template does not read what a row has; `variables`: for every row."""
        self._renderer, self._advice, self._variables = renderer, advice, variables
        self._reads_parts = self._same_with_parts()
        self._reads_objects, self._reads_json = self._argument_forms()
        self._reads_ids = bool({"id", "tool_call_id"} & renderer.names)

    def variables(self, conversation: Conversation, remarks: Counter[str]) -> dict[str, Any]:
        """The row's columns that the template reads. Counts other columns. Raises: DataError for those that matter."""
        columns = dict(conversation.columns)
        own = {name: value for name, value in columns.items() if name in self._renderer.variables}
        found = {**self._variables, **own, **columns.pop("chat_template_kwargs", {})}
        for name in columns.keys() - found.keys():
            if name in _SPOKEN:
                what = f"the row has {name} ({_SPOKEN[name]}), and the template does not read them"
                raise DataError(f"{what}; {self._advice}")
            _check_column(name, columns[name], remarks)
        return found

    def candidates(self, conversation: Conversation, remarks: Counter[str]) -> Iterator[Fitted]:
        """Forms of the turns to try in order: first the row's own, then others that some templates need.

        The others have null contents in turns that only call, or join neighbouring turns of one role.
        """
        messages = conversation.messages
        self._count(messages, remarks)
        fitted = [self._fitted(m) for m in messages]
        if conversation.is_agent and self._reads_ids:
            _number(fitted)
        yield messages, fitted
        if any("content" not in message for message in fitted):
            yield messages, [{"content": None, **message} for message in fitted]
        merged = neighbours_joined(messages, roles=("user", "assistant"))
        if len(merged) < len(messages):
            yield merged, [self._fitted(m) for m in merged]

    def _fitted(self, message: Message) -> dict[str, Any]:
        role = message.role
        if not message.fields and role != "developer":
            return {"role": role, "content": message.content}
        if role == "developer" and role not in self._renderer.names:
            role = "system"
        made = {"role": role, "content": message.content, **message.fields}
        if made["content"] is None:
            del made["content"]
        elif not self._reads_parts:
            made["content"] = message.content
        thoughts = next((made[name] for name in _REASONING if made.get(name) is not None), None)
        if thoughts is not None:  # as transformers does: one text under both names
            made = {"thinking": thoughts, **made, "reasoning_content": thoughts}
        if calls := made.get("tool_calls"):
            made["tool_calls"] = [self._call(call) for call in calls]
        return made

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The call, with its arguments in the form that the template reads: an object or JSON text."""
        inner = call.get("function")
        arguments = (inner if isinstance(inner, Mapping) else call).get("arguments")
        if isinstance(arguments, str) and self._reads_objects and not self._reads_json:
            try:
                arguments = from_json(arguments, place="arguments")
            except DataError:
                return dict(call)  # no JSON: as it stands
        elif isinstance(arguments, (Mapping, list)) and self._reads_json and not self._reads_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            return dict(call)
        if isinstance(inner, Mapping):
            return {**call, "function": {**inner, "arguments": arguments}}
        return {**call, "arguments": arguments}

    def _count(self, messages: Sequence[Message], remarks: Counter[str]) -> None:
        """Counts fields that nothing reads. Raises: DataError for those that should have changed the text."""
        names = self._renderer.names
        for message in messages:
            if not message.fields:
                continue
            for name in message.fields.keys() - names - _HARMLESS - {"content"}:
                if name in _REASONING and (set(_REASONING) & names or not message.fields[name]):
                    continue
                if name in (*_REASONING, "tool_calls"):
                    raise DataError(f"a message has {name}, and the template does not read it; {self._advice}")
                if name in _MEDIA and message.fields[name]:
                    raise DataError(f"a message has {name}, which a text model does not read; drop them or the row")
                remarks[f"nothing reads the messages' field {name!r}"] += 1

    def _same_with_parts(self) -> bool:
        question = [{"role": "user", "content": _PROBE}]
        parts = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            return self._renderer.render(question, {}).text == self._renderer.render(parts, {}).text
        except DataError:
            return False

    def _argument_forms(self) -> tuple[bool, bool]:
        """Whether the template writes object arguments as JSON, and whether it writes JSON text unchanged."""
        if "tool_calls" not in self._renderer.names:
            return True, True
        texts = [self._probed({_PROBE: 1}), self._probed('{"megabatch": 1}')]
        reads_objects = _PROBE in texts[0] and f"'{_PROBE}'" not in texts[0]
        reads_json = '"megabatch": 1' in texts[1]
        return (reads_objects, reads_json) if reads_objects or reads_json else (True, True)

    def _probed(self, arguments: Any) -> str:
        call = {"id": "0" * 9, "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "name": "f", "tool_call_id": "0" * 9, "content": "x"},
            {"role": "assistant", "content": "x"},
        ]
        for content in ({}, {"content": None}, {"content": ""}):
            try:
                return self._renderer.render([turns[0], {**turns[1], **content}, *turns[2:]], {}).text
            except DataError:
                continue
        return ""


def check_columns(row: Row, columns: Mapping[str, Any], remarks: Counter[str]) -> None:
    """Counts those of a row that nothing reads. Raises: DataError with the row's place for media."""
    for name, value in columns.items():
        try:
            _check_column(name, value, remarks)
        except DataError as e:
            raise DataError(f"{row.origin}: {e}") from e


def _check_column(name: str, value: Any, remarks: Counter[str]) -> None:
    """Counts a column that nothing reads. Raises: DataError for media, which a text model cannot see."""
    if not value or name in _HARMLESS or name.startswith("_"):
        return
    if name in _MEDIA:
        raise DataError(f"the row has {name}, which a text model does not read; drop the column or the row")
    remarks[f"nothing reads the column {name!r}"] += 1


def _number(messages: list[dict[str, Any]]) -> None:
    """Gives an id to calls that have none, and the same ids to their results, in order."""
    waiting: list[dict[str, Any]] = []
    count = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            call.setdefault("id", f"{count:09d}")
            count += 1
            waiting.append(call)
        if message["role"] == "tool" and waiting:
            call = waiting.pop(0)
            message.setdefault("tool_call_id", call["id"])
            message.setdefault("name", (call.get("function") or call).get("name"))
