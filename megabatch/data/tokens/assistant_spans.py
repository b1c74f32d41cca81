"""Finds assistant turns in a rendered conversation, for templates that do not loop over messages.

We render the conversation a second time with a sentinel in place of each assistant content. The text between sentinels
is the template's own plus the other roles' messages, and must occur in the same order in the real rendering. What
remains between is what the assistant says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megabatch.data.tokens.rendering import Span
from megabatch.errors import DataError

Render = Callable[[Sequence[Mapping[str, Any]]], str]


def assistant_spans(render: Render, messages: Sequence[Mapping[str, Any]], *, text: str, prompt: str) -> list[Span]:
    """For each assistant message, the span of the assistant's text in the rendered conversation `text`.

    A span starts right after the generation prompt if the template writes it literally, so it includes text that the
    template itself puts into the turn (an empty thinking block). It stops before the end-of-turn token.

    Raises: DataError when the two renderings cannot be aligned.
    """
    spans: list[Span] = []
    pieces = _pieces(render, messages)
    answers = [answer(m) for m in messages if m["role"] == "assistant"]
    before = _without_own(pieces[0], prompt)
    if not text.startswith(before):
        raise DataError("the text before the first assistant message depends on the assistant's messages")
    position = len(before)
    for index, said in enumerate(answers):
        last = index == len(answers) - 1
        after = pieces[-1] if last else _without_own(pieces[index + 1], prompt)
        stop = _stop(text, position, said, after=after, last=last)
        if stop is None:
            raise DataError(f"assistant message {index} is not found in the rendered conversation")
        spans.append((position, stop))
        position = stop + len(after)
    return spans


def answer(message: Mapping[str, Any]) -> str:
    """The part of a content that every template keeps: they trim it, and drop, move or re-space its thinking."""
    content = message.get("content")
    return content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""


def sentinel(messages: Sequence[Mapping[str, Any]]) -> str:
    """A text that no message contains."""
    everything, mark = repr(messages), "MEGABATCHTURN"
    while mark in everything:
        mark += "X"
    return mark


def _pieces(render: Render, messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Renders with sentinels as the assistant's contents and splits there: one more piece than assistant turns."""
    mark = sentinel(messages)
    sentinels = [f"{mark}{index}END" for index in range(sum(m["role"] == "assistant" for m in messages))]
    names = iter(sentinels)
    replaced = [{"role": "assistant", "content": next(names)} if m["role"] == "assistant" else m for m in messages]
    rest = render(replaced)
    pieces = []
    for index, name in enumerate(sentinels):
        piece, found, rest = rest.partition(name)
        if not found or mark in piece:
            raise DataError(f"it omits, repeats or reorders assistant message {index}")
        pieces.append(piece)
    if mark in rest:
        raise DataError("it repeats the last assistant message")
    return [*pieces, rest]


def _without_own(piece: str, prompt: str) -> str:
    """`piece` up to and including the generation prompt, without what the template adds at the start of the turn."""
    at = piece.rfind(prompt) if prompt else -1
    return piece if at < 0 else piece[: at + len(prompt)]


def _stop(text: str, start: int, said: str, *, after: str, last: bool) -> int | None:
    """Where the turn that starts at `start` stops: `after` follows it and, for the last turn, ends the text."""
    for stop in _candidates(text, start, after=after, last=last):
        if text[start:stop].strip().endswith(said):
            return stop
    return None


def _candidates(text: str, start: int, *, after: str, last: bool) -> Iterator[int]:
    if last:
        stop = len(text) - len(after)
        if stop >= start and text.endswith(after):
            yield stop
        return
    stop = text.find(after, start)
    while stop >= 0:
        yield stop
        stop = text.find(after, stop + 1)
