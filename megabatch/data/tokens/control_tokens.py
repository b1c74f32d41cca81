"""Control tokens in a dataset's text: tokenised as the plain text that they are, unless told otherwise.

A user's text that contains `<|im_end|>` must not end the turn. Before a template renders a message, we insert a
private character into each control token in it; control tokens in the rendered text without that character are the
template's own. A twin of the tokenizer, whose control tokens have private names, encodes the text: we write the
template's control tokens under those names, and nothing else in the text is special. Since the twin differs only in
names, everything that is not a control token gets the same ids as from the tokenizer itself, also next to former
control tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

from megabatch.errors import DataError

ESCAPED = "control tokens in the text, tokenised as plain text (see data.sanitize_control_tokens)"
"""The remark counted for such rows."""

_NAME = "\U0010f8f4"
"""Opens and closes the private name of a control token."""
OF_THE_ASSISTANT = re.compile(r"[<\[]/?(think|tool_call)[>\]]", re.IGNORECASE)
"""Control tokens of some tokenizers that the assistant's text in a dataset legitimately contains."""


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, extra: Iterable[str] = (), *, of_the_data: Collection[str] = ()) -> None:
        """`extra`: added tokens that separate turns although they are not declared special; `of_the_data`: special
        tokens that control nothing."""
        self._tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        listed = getattr(tokenizer, "chat_control_tokens", None) or ()
        known = set(tokenizer.get_added_vocab())
        self.tokens = sorted(
            {t for t in (*added, *map(str, tokenizer.all_special_tokens), *listed, *extra) if t in known and t.strip()}
            - {*of_the_data}
        )
        written = [json.dumps(token, ensure_ascii=False)[1:-1] for token in self.tokens]
        self._beginnings = tuple({text[:2] for text in written} | {f'{text[0]}"' for text in written})
        self._halves = {token[:end] for token in self.tokens for end in range(1, len(token))}
        self._longest_half = max(map(len, self._halves), default=0)
        self._any = _either(self.tokens)
        self._not_the_assistants = _either(t for t in self.tokens if not OF_THE_ASSISTANT.fullmatch(t))

    def may_be_in(self, text: str) -> bool:
        """Whether JSON might contain a control token, or the beginning of one at the end of a string.

        Fast; may give a false True, never a false False.
        """
        return any(beginning in text for beginning in self._beginnings)

    def are_in(self, text: str) -> bool:
        """Whether a text contains a control token."""
        return self._any.search(text) is not None

    def mark(self, value: Any, mark: str, *, by_assistant: bool = False) -> Any:
        """The value with `mark` inserted into every control token in its strings, at any depth.

        Also marks a string's end if it is the beginning of one: a template may write two strings side by side.
        """
        if isinstance(value, str):
            pattern = self._not_the_assistants if by_assistant else self._any
            marked = pattern.sub(lambda found: found[0][:1] + mark + found[0][1:], value)
            half = self._half_at_end(marked)
            return f"{marked[:-half]}{marked[-half]}{mark}{marked[len(marked) - half + 1 :]}" if half else marked
        if isinstance(value, Mapping):
            return {
                self.mark(key, mark): self.mark(item, mark, by_assistant=by_assistant) for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.mark(item, mark, by_assistant=by_assistant) for item in value]
        return value

    def _half_at_end(self, text: str) -> int:
        """Length of the longest beginning of a control token at the end of a text."""
        longest = min(self._longest_half, len(text))
        return next((size for size in range(longest, 0, -1) if text[-size:] in self._halves), 0)

    def spelled(self, text: str, mark: str | None = None) -> Spelling:
        """A marked text as the twin reads it; with `mark` None, the text has no control tokens of the template."""
        if _NAME in text:
            raise DataError(
                f"it holds the private character U+{ord(_NAME):X}, which megabatch uses for control tokens"
            )
        if mark is None:
            return Spelling(text, [], [])
        return _spell(text, re.compile(f"{re.escape(mark)}|{self._any.pattern}"), self._names, mark)

    @cached_property
    def _names(self) -> dict[str, str]:
        return {token: f"{_NAME}{number}{_NAME}" for number, token in enumerate(self.tokens)}

    @cached_property
    def twin(self) -> Any:
        """The twin, a `tokenizers.Tokenizer`. Raises: DataError if the tokenizer cannot be rebuilt."""
        from tokenizers import Tokenizer

        backend = self._tokenizer.backend_tokenizer
        try:
            twin = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), self._names)))
        except Exception as e:  # the Rust part raises bare Exceptions
            raise DataError(f"{_CANNOT} ({e}); {_ALLOW}") from e
        twin.no_truncation()
        twin.no_padding()
        twin.encode_special_tokens = False
        for token, name in self._names.items():
            if twin.token_to_id(name) != backend.token_to_id(token):
                raise DataError(f"{_CANNOT} ({token} would get another id); {_ALLOW}")
        return twin


_CANNOT = "control tokens in the data cannot be told from the template's with this tokenizer"
_ALLOW = "set data.sanitize_control_tokens=False if the data may contain them"


class Spelling:
    """A rewritten text, and where its characters moved."""

    def __init__(self, text: str, places: list[int], shifts: list[int]) -> None:
        self.text = text
        self._places, self._shifts = places, shifts

    def at(self, position: int) -> int:
        """The new position of the character that was at `position`."""
        after = bisect_right(self._places, position)
        return position + (self._shifts[after - 1] if after else 0)


def _spell(text: str, pattern: re.Pattern[str], names: Mapping[str, str], mark: str) -> Spelling:
    pieces, places, shifts = [], [], []
    done = shift = 0
    for found in pattern.finditer(text):
        instead = "" if found[0] == mark else names[found[0]]
        pieces += [text[done : found.start()], instead]
        done = found.end()
        shift += len(instead) - len(found[0])
        places.append(found.end())
        shifts.append(shift)
    return Spelling("".join([*pieces, text[done:]]), places, shifts)


def _either(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _renamed(made: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json with some tokens renamed, in its added tokens and in its model."""
    for token in made["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)
    model = made["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    elif vocabulary:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if merges := model.get("merges"):
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b[prefix:]} & names.keys()]
    return made
