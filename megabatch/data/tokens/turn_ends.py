"""The token that ends an assistant's turn, which is trained on too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from megabatch.data.tokens.control_tokens import OF_THE_ASSISTANT
from megabatch.data.tokens.rendering import Span


class TurnEnds:
    """Finds the special tokens that end turns; most templates write one, some write two."""

    def __init__(self, special: Iterable[str], *, eos: str | None) -> None:
        """`special`: the tokenizer's special tokens; `eos`: the one of them that may follow white space."""
        self._all = tuple(sorted(special, key=len, reverse=True))
        tokens = "|".join(map(re.escape, self._all)) or r"\b\B"  # else nothing matches
        spaced = r"\s*" + re.escape(eos) if eos else r"\b\B"
        self._eos = re.compile(spaced) if eos else None
        self._one = re.compile(f" *(?:{tokens})|{spaced}")
        self._run = re.compile(f" *(?:{tokens})+|{spaced}")

    def in_chunk(self, chunk: str) -> int | None:
        """Where a message's text ends, trailing white space aside, if it ends with a special token; else None."""
        said = chunk.rstrip()
        return len(said) if self.at_end(said) else None

    def extend(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """The spans of one conversation, each extended by its end of turn if it has one.

        All special tokens after the last turn belong to it. Earlier turns end with the same tokens, or with only the
        first special token, since the next message's header may follow directly.
        """
        closing = self._run.match(text, spans[-1][1]) if spans else None
        end = closing.group() if closing else ""
        return [self._extended(text, span, end=end) for span in spans]

    def trim(self, text: str, span: Span) -> Span:
        """The span without white space after the special token at its end, if there is one."""
        start, stop = span
        said = text[start:stop].rstrip()
        return (start, start + len(said)) if self.at_end(said) else span

    def complete(self, text: str, span: Span, *, eos_only: bool = False) -> Span:
        """A trimmed span, extended by the end of turn unless it has one; `eos_only`: only EOS may end it."""
        if self.at_end(text[slice(*span)]) or (eos_only and not (self._eos and self._eos.match(text, span[1]))):
            return span
        return self._with_one(text, span)

    def at_end(self, said: str) -> bool:
        """Whether a text ends with a special token."""
        return said.endswith(self._all)

    def without(self, said: str) -> int:
        """Length of a turn before the special tokens at its end; tokens that enclose thoughts and calls count as
        text."""
        length = len(said)
        while token := self.last(said[:length]):
            if OF_THE_ASSISTANT.fullmatch(token):
                break
            length -= len(token)
        return length

    def last(self, said: str) -> str | None:
        """The special token that a text ends with."""
        return max((token for token in self._all if said.endswith(token)), key=len, default=None)

    def _extended(self, text: str, span: Span, *, end: str) -> Span:
        start, stop = span
        return (start, stop + len(end)) if end and text.startswith(end, stop) else self._with_one(text, span)

    def _with_one(self, text: str, span: Span) -> Span:
        one = self._one.match(text, span[1])
        return (span[0], one.end()) if one else span
