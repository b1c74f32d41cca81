"""Rows → prompts: the conversation before the answer that is to be generated, and what rewards may read.

| shape | prompt |
| --- | --- |
| messages, conversations | all turns up to the assistant's last, which is left out where the row ends with it |
| query, question, prompt, instruction | that text; response, answer, completion, output may be absent |

An answer that the row has becomes the column `solution`, unless the row has one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, conversation_of, renamed, require_question
from megabatch.errors import DataError

SOLUTION = "solution"
_ANSWERS = {"query": "response", "question": "answer", "prompt": "completion", "instruction": "output"}
_NOTHING = "-"
_FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompt in one row."""

    conversation: Conversation
    """Its turns, and the columns that a chat template reads."""
    columns: Mapping[str, Any]
    """The row's other columns, for rewards and environments."""

    @property
    def for_rewards(self) -> dict[str, Any]:
        """All of the row's columns: those of chat templates too, since rewards may render the prompt (as TRL's)."""
        return {**self.conversation.columns, **self.columns}


@dataclass(slots=True)
class ColumnNames:
    """All names that some row has for rewards, so that a call whose rows lack one gets None, as others do.

    Rows with the same fields have the same names, except that a conversation may end with an answer or not.
    """

    found: set[str] = field(default_factory=set)
    seen: set[frozenset[str]] = field(default_factory=set)

    def add(self, row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> None:
        """Args: as of `prompt_of`."""
        fields = frozenset(name for name, value in row.fields.items() if value is not None)
        if fields not in self.seen or SOLUTION not in self.found:
            self.seen.add(fields)
            self.found |= prompt_of(row, columns=columns, system=system).for_rewards.keys()


def prompt_of(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> Asked:
    """The prompt of one row. Args: as of `conversation_of`. Raises: DataError with the row's place."""
    fields = renamed(row, columns)
    for question, answer in _ANSWERS.items():
        if fields.get(question) is not None and fields.get(answer) is None:
            fields[answer] = _NOTHING
    found = conversation_of(replace(row, fields=fields), system=system, answered=False)
    messages = list(found.messages)
    answer = messages.pop().content if messages and messages[-1].role == "assistant" else _NOTHING
    if not messages or messages[-1].role == "system":
        raise DataError(f"{row.origin}: has nothing to answer; a prompt needs a user's message")
    require_question(replace(found, messages=messages), row)
    rest = {name: value for name, value in found.columns.items() if name not in _FOR_TEMPLATES}
    if answer != _NOTHING:
        rest.setdefault(SOLUTION, answer)
    read = {name: value for name, value in found.columns.items() if name in _FOR_TEMPLATES}
    return Asked(replace(found, messages=messages, columns=read), rest)
