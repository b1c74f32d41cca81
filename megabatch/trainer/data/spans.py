"""Where the assistant's turns stand in a rendered conversation, for any chat template.

Templates trim contents, add default system messages and rewrite earlier turns (Qwen3 drops or inserts thinking
blocks), so a turn is not found by searching for its content. Instead the conversation is rendered a second time
with a sentinel in place of each assistant content; what lies between the sentinels is the template's own text plus
the other roles' messages, and that text must be met again, in order, in the real rendering. What is left between
is what the assistant says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megabatch.errors import DataError
from megabatch.trainer.data.formats import Message

Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) → text."""

Span = tuple[int, int]
"""Characters [start, stop)."""


def generation_prompt(render: Render) -> str:
    """What the template writes to make the assistant speak, `<|im_start|>assistant\\n` in ChatML; "" if nothing."""
    question = [Message("user", "x")]
    without, with_prompt = render(question, False), render(question, True)
    return with_prompt[len(without) :] if with_prompt.startswith(without) else ""


def assistant_spans(render: Render, messages: Sequence[Message], *, prompt: str) -> tuple[str, list[Span]]:
    """The rendered conversation and, for each assistant message, the span of what the assistant says in it.

    A span starts right after the generation prompt where the template writes it literally, so text that the template
    itself puts into the turn (an empty thinking block) belongs to it; it stops before the end-of-turn token.

    Raises: DataError when the two renderings cannot be aligned.
    """
    text = render(messages, False)
    spans: list[Span] = []
    pieces = _pieces(render, messages)
    contents = [m.content for m in messages if m.role == "assistant"]
    before = _without_own(pieces[0], prompt)
    if not text.startswith(before):
        raise DataError("the text before the first assistant message depends on what the assistant says")
    position = len(before)
    for index, content in enumerate(contents):
        last = index == len(contents) - 1
        after = pieces[-1] if last else _without_own(pieces[index + 1], prompt)
        stop = _stop(text, position, content, after=after, last=last)
        if stop is None:
            raise DataError(f"assistant message {index} is not found in the rendered conversation")
        spans.append((position, stop))
        position = stop + len(after)
    return text, spans


def _pieces(render: Render, messages: Sequence[Message]) -> list[str]:
    """The rendering with sentinels for the assistant's contents, cut at the sentinels: one more piece than turns."""
    everything = "".join(m.content for m in messages)
    mark = "MEGABATCHTURN"
    while mark in everything:
        mark += "X"
    sentinels = [f"{mark}{index}END" for index in range(sum(m.role == "assistant" for m in messages))]
    names = iter(sentinels)
    rest = render([Message("assistant", next(names)) if m.role == "assistant" else m for m in messages], False)
    pieces = []
    for index, sentinel in enumerate(sentinels):
        piece, found, rest = rest.partition(sentinel)
        if not found or mark in piece:
            raise DataError(f"it leaves out, repeats or reorders assistant message {index}")
        pieces.append(piece)
    if mark in rest:
        raise DataError("it repeats the last assistant message")
    return [*pieces, rest]


def _without_own(piece: str, prompt: str) -> str:
    """`piece` up to the generation prompt, without what the template itself puts at the start of the turn."""
    at = piece.rfind(prompt) if prompt else -1
    return piece if at < 0 else piece[: at + len(prompt)]


def _stop(text: str, start: int, content: str, *, after: str, last: bool) -> int | None:
    """Where the turn that starts at `start` stops, so that `after` follows (and, for the last one, ends the text)."""
    # The template may trim the content, and drop, move or re-space its thinking; what follows that must survive.
    answer = content.rpartition("</think>")[2].strip()
    for stop in _candidates(text, start, after=after, last=last):
        if text[start:stop].strip().endswith(answer):
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
