"""Rows with a good and a bad answer → two conversations.

| shape | fields |
| --- | --- |
| rejected answer | any shape of `formats`, and `rejected_response`: the text in the place of its last answer |
| rejected messages | any list of messages, and `rejected_messages`: the whole conversation with the bad answer |
| prompt, chosen, rejected | texts, or lists of messages (TRL) |
| chosen, rejected | whole conversations (TRL's implicit prompt) |

The turns with which both conversations begin are the prompt, and the turn after them is the assistant's in both: what
follows is the answer. Where answers begin before the last user message, all of the assistant's turns in them are
learned. Other conversations beside `chosen` and `rejected` (`messages`, `query`, …) are not read, nor is a text as
`prompt` beside whole ones; they count as columns that nothing reads where they say something else.

Every shape may carry `margin` (by how much the first answer is better), `ref_chosen_logps` and `ref_rejected_logps`
(TRL: the log-probabilities of the answers, which a reference gave them), and what a conversation may carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megabatch.data.rows.files import Row
from megabatch.data.rows.formats import Conversation, conversation_of, is_text, renamed, require_question
from megabatch.data.rows.numbers import is_number, told
from megabatch.data.rows.one_prompt import answers_start, learned_from, read_alike, refuse_another_prompt, weighed
from megabatch.data.rows.turns import Message, said_as_list, short, turns_of
from megabatch.errors import DataError
from megabatch.values import dataclass

_REJECTED = ("rejected", "rejected_response", "rejected_messages")
_LISTS = ("messages", "conversations", "conversation")
_OTHERS = frozenset(
    {*_LISTS, "instruction", "output", "query", "response", "question", "answer", "text", "completion"}
)
_GIVEN = ("ref_chosen_logps", "ref_rejected_logps")
_OWN = (*_REJECTED, *_GIVEN, "chosen", "margin")


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that answer the same prompt."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0
    """By how much the chosen answer is better; 0 if the row does not say."""
    ref_logps: tuple[float, float] | None = None
    """Log-probabilities of both answers that a reference gave them, if the row has them."""


def is_preference(row: Row, *, columns: Mapping[str, str] | None = None) -> bool:
    """Whether a row has a bad answer."""
    fields = renamed(row, columns)
    return any(fields.get(name) is not None for name in _REJECTED)


def preference_of(row: Row, *, columns: Mapping[str, str] | None = None, system: str | None = None) -> Preference:
    """The two conversations of one row.

    Args: `columns`: field name in the dataset → accepted name, applied first; `system`: system message for rows that
    have none.
    Raises: DataError with the row's place for a missing or empty answer, an empty prompt, answers to different
    prompts (with what differs), a number that is not finite, or what `conversation_of` refuses.
    """
    fields = {name: value for name, value in renamed(row, columns).items() if value is not None}
    given = [name for name in _REJECTED if name in fields]
    if len(given) != 1:
        what = f"has {' and '.join(given)}, of which one is enough" if given else "has no rejected answer"
        raise DataError(
            f"{row.origin}: {what}; give rejected_response (the text of the bad answer), rejected_messages (the "
            "conversation that ends with it), or chosen and rejected"
        )
    chosen, rejected = read_alike(*_PAIRS[given[0]](fields, row, system))
    start = answers_start(chosen, rejected, row)
    for asked in (replace(chosen, messages=chosen.messages[: start + 1]), chosen, rejected):
        require_question(asked, row)
    return Preference(
        learned_from(start, chosen),
        learned_from(start, rejected),
        _margin(fields.get("margin"), row),
        _ref_logps(fields, row),
    )


def _with_response(fields: Mapping[str, Any], row: Row, system: str | None) -> tuple[Conversation, Conversation]:
    rejected = fields["rejected_response"]
    if not isinstance(rejected, str) or not rejected.strip() or not is_text(rejected):
        raise DataError(f"{row.origin}: rejected_response must be a text that is not empty, not {short(rejected)}")
    chosen = _conversation(_without_own(fields), row, system)
    asked = list(chosen.messages)
    while asked and asked[-1].role == "assistant":
        asked.pop()
    return chosen, replace(chosen, messages=[*asked, Message("assistant", rejected)])


def _with_messages(fields: Mapping[str, Any], row: Row, system: str | None) -> tuple[Conversation, Conversation]:
    name = next((name for name in _LISTS if name in fields), None)
    if name is None:
        raise DataError(f"{row.origin}: rejected_messages needs messages beside it: the conversation to prefer")
    shared = _without_own(fields)
    chosen, rejected = shared, shared | {name: fields["rejected_messages"]}
    return _conversation(chosen, row, system), _named("rejected_messages", rejected, row, system)


def _chosen_and_rejected(fields: Mapping[str, Any], row: Row, system: str | None) -> tuple[Conversation, Conversation]:
    if "chosen" not in fields:
        raise DataError(f"{row.origin}: rejected needs chosen beside it: the answer to prefer")
    chosen, rejected, prompt = (
        said_as_list(fields.get(name), place=f"{row.origin}: {name}") for name in ("chosen", "rejected", "prompt")
    )
    shared = {name: value for name, value in _without_own(fields).items() if name not in _OTHERS}
    unread = {name: fields[name] for name in sorted(_OTHERS & fields.keys()) if fields[name] not in (chosen, rejected)}
    if _is_whole(chosen, row):
        pair = _whole(shared, chosen, rejected, row, system)
        if isinstance(prompt, str) and not any(message.content == prompt for message in pair[0].messages):
            unread["prompt"] = prompt
        return _beside(unread, *pair)
    if prompt is None:
        raise DataError(
            f"{row.origin}: chosen and rejected are answers without a prompt; add prompt, or make them lists of "
            "messages that begin with it"
        )
    first = _named("chosen", shared | {"completion": chosen}, row, system)
    return _beside(unread, first, _named("rejected", shared | {"completion": rejected}, row, system))


def _beside(unread: Mapping[str, Any], *pair: Conversation) -> tuple[Conversation, Conversation]:
    """The pair with columns that are none of it, so that they are counted as such."""
    chosen, rejected = (replace(one, columns={**unread, **one.columns}) for one in pair)
    return chosen, rejected


_PAIRS = {
    "rejected": _chosen_and_rejected,
    "rejected_response": _with_response,
    "rejected_messages": _with_messages,
}
"""What reads a row, by the field with its bad answer."""


def _is_whole(chosen: Any, row: Row) -> bool:
    """Whether it is a conversation with its prompt, which the assistant does not begin."""
    return isinstance(chosen, list) and turns_of(chosen, place=f"{row.origin}: chosen").messages[0].role != "assistant"


def _whole(
    fields: dict[str, Any], chosen: Any, rejected: Any, row: Row, system: str | None
) -> tuple[Conversation, Conversation]:
    """Two conversations whose prompt is what both begin with; its turns are not learned, unless a message asks for
    it."""
    if not isinstance(rejected, list):
        raise DataError(f"{row.origin}: rejected must be a list of messages, as chosen is, not {short(rejected)}")
    prompt = said_as_list(fields.pop("prompt", None), place=f"{row.origin}: prompt")
    first = _named("chosen", fields | {"messages": chosen}, row, system)
    second = _named("rejected", fields | {"messages": rejected}, row, system)
    if isinstance(prompt, list):
        refuse_another_prompt(turns_of(prompt, place=f"{row.origin}: prompt").messages, first, row)
    start = answers_start(first, second, row)
    return weighed(first, range(start), 0.0), weighed(second, range(start), 0.0)


def _without_own(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _OWN}


def _conversation(fields: dict[str, Any], row: Row, system: str | None) -> Conversation:
    return conversation_of(replace(row, fields=fields), system=system)


def _named(which: str, fields: dict[str, Any], row: Row, system: str | None) -> Conversation:
    """The conversation of one answer, which errors name."""
    try:
        return _conversation(fields, row, system)
    except DataError as e:
        raise DataError(f"{e} (the conversation of {which})") from e


def _margin(value: Any, row: Row) -> float:
    return 0.0 if told(value) is None else _number("margin", value, row)


def _ref_logps(fields: Mapping[str, Any], row: Row) -> tuple[float, float] | None:
    given = [name for name in _GIVEN if told(fields.get(name)) is not None]
    if not given:
        return None
    if len(given) == 1:
        raise DataError(f"{row.origin}: has {given[0]} alone; give {' and '.join(_GIVEN)}, or neither")
    chosen, rejected = (_number(name, fields[name], row) for name in _GIVEN)
    if max(chosen, rejected) > 0:
        raise DataError(f"{row.origin}: {' and '.join(_GIVEN)} are log-probabilities, and not above 0")
    return chosen, rejected


def _number(name: str, value: Any, row: Row) -> float:
    number = told(value)
    if not is_number(number):
        raise DataError(f"{row.origin}: {name} must be a finite number, not {short(value)}")
    return float(number)
