"""ASCII texts → token ids of a byte-level BPE, with the ids of words that came before looked up.

Such a tokenizer cuts a text into words by a pattern and merges the bytes within each. Most words of a data set came
before, and a dictionary in Python finds them in less than half of the time that the tokenizer takes. Only ASCII: there
Python's `re` and the tokenizer's engine agree on what a letter, a digit and a blank is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

MOST_WORDS = 2**17
LONGEST_WORD = 64
"""Longer words are not kept."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of `ByteLevel(use_regex=True)`."""

_ASCII = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "N": "0-9"}
"""The ASCII characters of Unicode's categories."""
_KNOWN = re.compile(
    r"(?P<category>\\p\{[A-Z][a-z]?\})|(?P<opens>\[\^?)|(?P<closes>\])"
    r"|\(\?i:|\(\?!|\(\?:|[()|?*+]|\{\d+(?:,\d*)?\}(?![?*+])|\\[sSrn/]|[ '/A-Za-z0-9]"
)
"""What a pattern may consist of to mean the same here."""
_BYTES = {n: chr(n) if 0x21 <= n <= 0x7E else chr(0x100 + n - (n > 0x7E) * 0x5E) for n in range(0x80)}
"""How byte-level vocabularies write ASCII characters."""


class Words(dict[str, tuple[int, ...]]):
    """The ids of each word."""

    def __init__(self, backend: Any, pattern: str) -> None:
        """`backend`: a `tokenizers.Tokenizer` that `words_of` accepts; `pattern`: what matches a word, for `re`."""
        super().__init__()
        added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        self._added = {content: (number,) for content, number in added.items() if content.isascii()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._between = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._model, self._cut = backend.model, re.compile(pattern, re.ASCII).findall

    def ids(self, text: str) -> list[int]:
        """Of an ASCII text, without the special tokens that the tokenizer adds; fewer than the tokenizer's where its
        pattern leaves characters out."""
        found: list[tuple[int, ...]] = []
        start = 0
        for match in self._between.finditer(text) if self._between else ():
            found += map(self.__getitem__, self._cut(text[start : match.start()]))
            found.append(self._added[match[0]])
            start = match.end()
        found += map(self.__getitem__, self._cut(text[start:]))
        return list(chain.from_iterable(found))

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word.translate(_BYTES)))
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def words_of(backend: Any) -> Words | None:
    """None for a tokenizer whose words or added tokens may be others here.

    Args: `backend`: a byte-level `tokenizers.Tokenizer` that leaves ASCII texts as they are before it cuts them.
    """
    added = backend.get_added_tokens_decoder().values()
    if backend.encode_special_tokens or backend.model.dropout or any(token.single_word for token in added):
        return None
    if len({token.normalized for token in added if token.content.isascii()}) > 1:
        return None  # those of one kind are looked for before the others
    given = _pattern(json.loads(backend.pre_tokenizer.__getstate__()))
    pattern = None if given is None else in_ascii(given)
    return None if pattern is None else Words(backend, pattern)


def _pattern(made: Mapping[str, Any]) -> str | None:
    """The one pattern that cuts words."""
    steps = made["pretokenizers"] if made["type"] == "Sequence" else [made]
    patterns = []
    for step in steps:
        if step["type"] == "ByteLevel":
            patterns += [GPT2] * step["use_regex"]
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        else:
            return None
    return patterns[0] if len(patterns) == 1 else None


def in_ascii(pattern: str) -> str | None:
    """A pattern of Oniguruma for Python's `re` and ASCII texts; None if any of it may mean something else there."""
    made, at, inside = "", 0, False
    while at < len(pattern):
        found = _KNOWN.match(pattern, at)
        if found is None:
            return None
        what = found[0]
        if found["category"]:
            characters = _ASCII.get(what[3:-1])
            if characters is None:
                return None
            what = characters if inside else f"[{characters}]"
        elif inside and (found["opens"] or what[0] in "({"):
            return None
        inside = (inside or bool(found["opens"])) and not found["closes"]
        made, at = made + what, found.end()
    return None if "[]" in made or "[^]" in made else made
