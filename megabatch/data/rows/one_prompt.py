"""Two conversations that answer one prompt: where their answers begin, and what of them is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation
from megabatch.data.rows.turns import Message, short
from megabatch.errors import DataError

_SYSTEM = ("system", "developer")


def refuse_another_prompt(prompt: Sequence[Message], chosen: Conversation, row: Row) -> None:
    """Raises: DataError for messages of a prompt with which the conversation beside them does not begin."""
    said = chosen.messages
    if said[0].role in _SYSTEM and prompt[0].role not in _SYSTEM:
        said = said[1:]
    for number, given in enumerate(prompt):
        if number >= len(said) or not _are_alike(given, said[number]):
            found = f"has {_difference(said[number], given)}" if number < len(said) else "has ended"
            raise DataError(
                f"{row.origin}: chosen and rejected are whole conversations, and prompt beside them is another: at "
                f"its message {number} chosen {found}; leave the prompt out of one of them"
            )


def read_alike(one: Conversation, other: Conversation) -> tuple[Conversation, Conversation]:
    """Both in the form of the one whose calls are separate turns, if one is, so that templates get the same tools."""
    form = one if one.is_agent else other
    columns, is_agent = form.columns, form.is_agent
    return replace(one, columns=columns, is_agent=is_agent), replace(other, columns=columns, is_agent=is_agent)


def answers_start(chosen: Conversation, rejected: Conversation, row: Row) -> int:
    """The first turn that is not the prompt's: the assistant's in both. Raises: DataError where it is not."""
    for name, said_in in (("chosen", chosen), ("rejected", rejected)):
        last = said_in.messages[-1]
        if last.role != "assistant":
            said = f"ends with a message of the {last.role} ({short(last.content)})"
            raise DataError(f"{row.origin}: the {name} conversation {said}; it must end with the answer to compare")
    both = list(zip(chosen.messages, rejected.messages, strict=False))
    start = next((number for number, (one, other) in enumerate(both) if not _are_alike(one, other)), len(both))
    if start == len(chosen.messages) == len(rejected.messages):
        start -= 1  # equal answers, which the encoder counts
    if start == len(both):
        longer, shorter = ("chosen", "rejected") if len(chosen.messages) > start else ("rejected", "chosen")
        raise DataError(
            f"{row.origin}: the {longer} conversation goes on where the {shorter} one ends, after message "
            f"{start - 1} ({short(both[-1][0].content)}); they must begin with one prompt and end with an answer each"
        )
    first, second = both[start]
    if {first.role, second.role} != {"assistant"}:
        raise DataError(
            f"{row.origin}: the chosen and the rejected answer must follow the same prompt, and message {start} "
            f"differs: {_difference(first, second)}"
        )
    if not start:
        raise DataError(f"{row.origin}: the chosen and the rejected answer must follow a prompt, and have none")
    return start


def _are_alike(one: Message, other: Message) -> bool:
    """Whether two turns say the same, learned or not; a content in parts is its text."""
    return _said(one) == _said(other)


def _said(message: Message) -> tuple[str, str, dict[str, Any]]:
    fields = {name: value for name, value in message.fields.items() if name != "content"}
    return message.role, message.content, fields


def _difference(one: Message, other: Message) -> str:
    """Two turns that differ, shortened to where they do."""
    texts = [one.content, other.content]
    if texts[0] == texts[1] and one.role == other.role:
        texts = [repr(_said(message)[2]) for message in (one, other)]
    start = max(_first_difference(*texts) - 20, 0)
    return " and ".join(
        f"{message.role} {_cut(text, start)!r}" for message, text in zip((one, other), texts, strict=True)
    )


def _first_difference(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (mine, its) in enumerate(pairs) if mine != its), min(len(one), len(other)))


def _cut(text: str, start: int) -> str:
    """40 characters of a text."""
    end = start + 40
    return ("…" if start else "") + text[start:end] + ("…" if len(text) > end else "")


def learned_from(start: int, conversation: Conversation) -> Conversation:
    """The conversation whose answer is what begins at a turn: `last_round` would learn its last part alone."""
    users = [number for number, message in enumerate(conversation.messages) if message.role == "user"]
    return weighed(conversation, range(start, max(users, default=0)), 1.0)


def weighed(conversation: Conversation, turns: range, weight: float) -> Conversation:
    """The conversation, with this weight in the loss for the assistant's turns among these that have none."""
    messages = [
        replace(message, loss=weight)
        if number in turns and message.role == "assistant" and message.loss is None
        else message
        for number, message in enumerate(conversation.messages)
    ]
    return replace(conversation, messages=messages)
