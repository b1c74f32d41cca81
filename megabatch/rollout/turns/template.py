"""The tokens between two turns of the model, from the chat template; the model's own tokens are not rendered again."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from megabatch.errors import RolloutError

_TURN = "\U0010f8f5 turn \U0010f8f5"
_BREAK = "\U0010f8f6"
"""Private characters, which no text has: they stand for the model's turn, and break control tokens in answers."""


def between(
    answers: Sequence[Mapping[str, Any]],
    *,
    render: Callable[[Sequence[Mapping[str, Any]]], str],
    encode: Callable[[str], Sequence[int]],
    control_tokens: Collection[str],
    last_id: int | None,
) -> tuple[int, ...]:
    """Token ids from the end of the model's turn to the beginning of its next one.

    Args: `answers`: to the model's turn. `render`: the template on the conversation before the model's turn and these
    messages behind it, with the opening of the model's next turn at the end. `encode`: text to ids, control tokens
    included, without adding any. `control_tokens`: become plain text where an answer contains them, so that no answer
    can end a turn. `last_id`: the last token that the model drew: if it is what the template closes a turn with, it is
    not added again.
    Raises: RolloutError for a template that leaves out a turn of the assistant's.
    """
    broken = [{**answer, "content": _broken(str(answer["content"]), control_tokens)} for answer in answers]
    text = render([{"role": "assistant", "content": _TURN}, *broken])
    _, found, after = text.rpartition(_TURN)
    if not found:
        raise RolloutError("the chat template does not write the assistant's last turn, which several turns need")
    ids = [token for piece in after.split(_BREAK) if piece for token in encode(piece)]
    return tuple(ids[1:] if ids and ids[0] == last_id else ids)


def _broken(text: str, tokens: Collection[str]) -> str:
    text = text.replace(_TURN, "").replace(_BREAK, "")
    if not tokens:
        return text
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.sub(pattern, lambda match: f"{match[0][0]}{_BREAK}{match[0][1:]}", text)
