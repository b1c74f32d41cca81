"""Pipeline layout strings such as `E|(t|)*3,m|m||L`, read with the place of every mistake.

    layout = item*                      one stage for each `|`, plus one
    item   = part [`*` count]
    part   = `E` | `t` | `m` | `L` | `|` | `(` part* `)`     a group needs its count, and groups do not nest

Commas and spaces mean nothing. E is the embedding, t a transformer layer, m an MTP layer, L the output and loss.
"""

from __future__ import annotations

from megabatch.errors import ConfigError

_LETTERS = "EtmL"
_EMPTY = ", "


def parse(text: str) -> tuple[str, ...]:
    """The letters of each stage, in order: `E|(t|)*2L` gives `("E", "t", "t", "L")`.

    Raises: ConfigError naming the position (from 1) of what cannot be read.
    """
    return tuple(_Reader(text).items().split("|"))


class _Reader:
    """Reads from left to right, writing repetitions out."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def items(self) -> str:
        written = ""
        while self._peek():
            written += self._item()
        return written

    def _item(self) -> str:
        start = self.at
        if self._peek() == "(":
            part = self._group()
            self._need("*", f"a group needs a count, as in {self.text[start : self.at]}*2")
            return part * self._count()
        part = self._letter()
        if self._peek() == "*":
            self.at += 1
            return part * self._count()
        return part

    def _group(self) -> str:
        start = self.at
        self.at += 1
        inside = ""
        while self._peek() != ")":
            if not self._peek():
                self.at = start
                raise self._error("this group is never closed")
            if self._peek() == "(":
                raise self._error("a group inside a group cannot be read")
            inside += self._letter()
        self.at += 1
        return inside

    def _letter(self) -> str:
        letter = self._peek()
        if letter not in (*_LETTERS, "|"):
            raise self._error(f"{letter!r} is none of E, t, m, L, '|', '(' and '*'")
        self.at += 1
        return letter

    def _count(self) -> int:
        self._peek()
        start = self.at
        while self.at < len(self.text) and self.text[self.at].isdigit():
            self.at += 1
        if not int(self.text[start : self.at] or 0):
            self.at = start
            raise self._error("'*' needs a count of 1 or more")
        return int(self.text[start : self.at])

    def _peek(self) -> str:
        """The next character that means something, or nothing at the end."""
        while self.at < len(self.text) and self.text[self.at] in _EMPTY:
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _need(self, character: str, why: str) -> None:
        if self._peek() != character:
            raise self._error(why)
        self.at += 1

    def _error(self, why: str) -> ConfigError:
        return ConfigError(f"cannot be read at position {self.at + 1}: {why}")
