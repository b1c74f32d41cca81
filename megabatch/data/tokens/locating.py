"""Finds the characters of a rendered conversation to train on: the assistant's."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megabatch.data.tokens.assistant_spans import answer, assistant_spans, sentinel
from megabatch.data.tokens.rendering import Rendered, Renderer, Span
from megabatch.data.tokens.turn_ends import TurnEnds
from megabatch.errors import DataError

Messages = Sequence[Mapping[str, Any]]
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")


class Part(NamedTuple):
    """Characters to train on."""

    turn: int
    """Index among the assistant's messages."""
    start: int
    stop: int


class Locator:
    """Finds the assistant's turns in what one template renders."""

    def __init__(self, renderer: Renderer, ends: TurnEnds) -> None:
        self._renderer, self._ends = renderer, ends
        self._prompts = self._generation_prompts()
        own, self._tail, self._has_chunks = self._probed()
        headers = [*self._prompts, _THINKING.sub("", own)] if own is not None else self._prompts
        self._headers = [header for header in dict.fromkeys(headers) if header]
        self._always_bare = own == ""

    @property
    def prompt(self) -> str:
        """The template's generation prompt without a thinking block; "" if it has none."""
        return self._prompts[-1]

    def parts(self, messages: Messages, variables: Mapping[str, Any], rendered: Rendered) -> list[Part]:
        """The characters to train on if every turn is trained. Raises: DataError if they cannot be found."""
        if self._renderer.marks_turns:
            return self._marked(messages, variables, rendered)
        assistants = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
        if not all(self._is_whole(messages[index], rendered, index) for index in assistants):
            aligned = self._aligned(messages, variables, rendered.text)
            return [Part(turn, *span) for turn, span in enumerate(aligned)]
        return [
            Part(turn, *span)
            for turn, index in enumerate(assistants)
            for span in self._said(messages, variables, rendered, index)
        ]

    def _is_whole(self, message: Mapping[str, Any], rendered: Rendered, index: int) -> bool:
        """Whether the text that the template's loops wrote for a message contains its content."""
        chunk = rendered.chunks.get(index) if self._has_chunks else None
        return chunk is not None and (
            bool(message.get("tool_calls")) or answer(message) in rendered.text[slice(*chunk)]
        )

    def _said(self, messages: Messages, variables: Mapping[str, Any], rendered: Rendered, index: int) -> list[Span]:
        """The spans of an assistant message, from the end of its header to the end of its turn."""
        text, chunk = rendered.text, rendered.chunks[index]
        start = self._start(text, chunk)
        if start is None:
            start = chunk[0] + self._header_by_sentinel(messages, variables, index, text[slice(*chunk)])
        after = messages[index + 1]["role"] if index + 1 < len(messages) else None
        if after in ("tool", "ipython") and index + 1 not in rendered.chunks:
            return self._without_results(messages, variables, rendered, index, header=start - chunk[0])
        stop = self._ends.in_chunk(text[start : chunk[1]])
        if stop is not None:
            return [(start, start + stop)]
        span = start, self._without_tail(text, start, chunk[1])
        is_next = any(begin == span[1] for begin, _ in rendered.chunks.values())
        return [self._ends.complete(text, span, eos_only=is_next)]

    def _without_results(
        self, messages: Messages, variables: Mapping[str, Any], rendered: Rendered, index: int, *, header: int
    ) -> list[Span]:
        """The turn without the results of its calls, for templates that write them into it (like Gemma 4's)."""
        alone = self._renderer.render(messages[: index + 1], variables)
        said = alone.text[slice(*alone.chunks.get(index, (0, 0)))][header:]
        text, span = rendered.text, (rendered.chunks[index][0] + header, rendered.chunks[index][1])
        whole = text[slice(*span)]
        before = _shared(said, whole)
        behind = _shared(said[before:][::-1], whole[before:][::-1])
        spans = [(span[0], span[0] + before), (span[1] - behind, span[1])]
        content = answer(messages[index])
        if content and not behind and content not in whole[:before] and content in whole:
            at = span[0] + whole.rfind(content)
            spans[1] = (at, at + len(content))
        return [self._ends.trim(text, found) for found in spans if text[slice(*found)].strip()]

    def _start(self, text: str, chunk: Span) -> int | None:
        """Where a turn's header ends, if it is one of the template's usual headers; else None."""
        for header in self._headers:
            if text.startswith(header, chunk[0]):
                return chunk[0] + len(header)
        if self._always_bare or any(text.endswith(header, 0, chunk[0]) for header in self._headers):
            return chunk[0]
        return None

    def _header_by_sentinel(self, messages: Messages, variables: Mapping[str, Any], index: int, chunk: str) -> int:
        """Length of an unusual header, for example one that names the speaker or follows a tool's result."""
        mark = sentinel(messages)
        other = self._renderer.render([*messages[:index], {"role": "assistant", "content": mark}], variables)
        span = other.chunks.get(index)
        header, found, _ = other.text[slice(*span)].partition(mark) if span else ("", "", "")
        if not found:
            raise DataError(f"it omits assistant message {index}, or writes it in another place")
        return _shared(_THINKING.sub("", header), chunk)

    def _without_tail(self, text: str, start: int, stop: int) -> int:
        tail = self._tail
        return stop - len(tail) if tail and text.endswith(tail, start, stop) else stop

    def _marked(self, messages: Messages, variables: Mapping[str, Any], rendered: Rendered) -> list[Part]:
        """The parts that the template itself marks with `{% generation %}`."""
        text = rendered.text
        spans = [self._ends.trim(text, span) for span in rendered.generated if span[0] < span[1]]
        if not spans:
            raise DataError("it marks nothing as generation")
        assistants = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
        if len(spans) == len(assistants):
            return [Part(turn, *self._ends.complete(text, span)) for turn, span in enumerate(spans)]
        # A turn may have several marks (header, text, end): each belongs to the first turn that ends after it.
        stops = [rendered.chunks[index][1] for index in assistants if index in rendered.chunks]
        if len(stops) < len(assistants):
            stops = [stop for _, stop in self._aligned(messages, variables, text)]
        last = len(assistants) - 1
        return [Part(min(bisect_left(stops, start + 1), last), start, stop) for start, stop in spans]

    def _aligned(self, messages: Messages, variables: Mapping[str, Any], text: str) -> list[Span]:
        """Spans from a second rendering, with the first generation prompt that fits."""

        def render(changed: Messages) -> str:
            return self._renderer.render(changed, variables).text

        error = None
        for prompt in self._prompts:
            try:
                return self._ends.extend(text, assistant_spans(render, messages, text=text, prompt=prompt))
            except DataError as e:
                error = e
        assert error is not None
        raise error

    def _generation_prompts(self) -> list[str]:
        """Texts that may precede the assistant's own text, to try in this order.

        First the template's generation prompt; then the same without a thinking block that it opens or fills, for
        turns that have their own thoughts.
        """
        question = [{"role": "user", "content": "x"}]
        try:
            without = self._renderer.render(question, {}).text
            asking = self._renderer.render(question, {"add_generation_prompt": True}).text
        except DataError:
            return [""]  # the template refuses the probe; spans then start where the template's own text ends
        prompt = asking[len(without) :] if asking.startswith(without) else ""
        return list(dict.fromkeys([prompt, _THINKING.sub("", prompt)]))

    def _probed(self) -> tuple[str | None, str, bool]:
        """What the template writes before and after a content, and whether its loops tell the turns apart."""
        mark = "MEGABATCHTURN"
        try:
            rendered = self._renderer.render(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}], {}
            )
        except DataError:
            return None, "", True
        if 1 not in rendered.chunks:
            return None, "", False
        before, found, after = rendered.text[slice(*rendered.chunks[1])].partition(mark)
        return before, after, bool(found) and mark not in after


def _shared(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
