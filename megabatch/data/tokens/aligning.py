"""Texts → tokens, with the loss weights of their characters as weights of tokens.

A tokenizer can return the characters of each token, but then takes a third longer. Byte-level tokenizers (GPT-2,
Llama 3, Qwen, DeepSeek, …) lose nothing: their tokens are the text's bytes in order, so the lengths of the tokens are
enough.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from megabatch.data.tokens.sample import Encoded
from megabatch.data.tokens.words import words_of


class Text(NamedTuple):
    """A text, and the weights of its characters."""

    text: str
    parts: list[tuple[int, int, float]]
    """(start, stop, weight)"""

    def sizes(self) -> Iterator[tuple[int, int, float]]:
        """The parts with offsets in bytes."""
        if self.text.isascii():
            return iter(self.parts)
        return ((_bytes(self.text[:a]), _bytes(self.text[:a]) + _bytes(self.text[a:b]), w) for a, b, w in self.parts)


class Aligner:
    """Encodes texts with one tokenizer."""

    def __init__(self, backend: Any) -> None:
        """`backend`: a `tokenizers.Tokenizer`."""
        self._backend = backend
        self._lengths, self._is_nfc = _byte_lengths(backend), backend.normalizer is not None
        self._words = None if self._lengths is None else words_of(backend)

    def encode(self, texts: Sequence[Text], *, whole: bool) -> list[Encoded]:
        """Ids without the special tokens that the tokenizer adds, and weights. A token that shares a character with a
        part gets the part's weight (with two parts, the later one's), others get `whole`. Nothing predicts the first
        token, so its weight is 0."""
        if self._lengths is None:
            return self._by_offsets(texts, whole=whole)
        made = self._by_bytes(texts, self._lengths, whole=whole)
        return [
            found or _by_offsets(self._untrimmed.encode(text.text, add_special_tokens=False), text, whole=whole)
            for found, text in zip(made, texts, strict=True)
        ]

    @cached_property
    def _untrimmed(self) -> Any:
        """The byte-level tokenizer with offsets that cover all characters. Llama 3's offsets leave blanks out, so a
        part could not be told from the blanks around it."""
        from tokenizers import Tokenizer, processors

        backend = Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = self._backend.encode_special_tokens
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return backend

    def _by_bytes(self, texts: Sequence[Text], lengths: np.ndarray, *, whole: bool) -> list[Encoded | None]:
        """None for a text whose tokens are not its bytes, because the tokenizer normalised it."""
        listed = self._ids([text.text for text in texts])
        ids = np.fromiter(chain.from_iterable(listed), np.int32)
        weights: np.ndarray = np.full(len(ids), whole, np.float32)
        stops = np.cumsum(lengths[ids])  # end of each token in bytes, over all texts concatenated
        begins = stops - lengths[ids]
        found: list[Encoded | None] = []
        token = byte = 0
        for text, own in zip(texts, listed, strict=True):
            after = token + len(own)
            size = _bytes(text.text)
            if not own or stops[after - 1] - byte != size or not self._stands(text.text):
                byte = int(stops[after - 1]) if after else 0
                found.append(None)
            else:
                for start, stop, weight in text.sizes():
                    if start < stop:
                        first = token + stops[token:after].searchsorted(byte + start, "right")
                        end = token + begins[token:after].searchsorted(byte + stop, "left")
                        weights[first:end] = weight
                weights[token] = 0
                byte += size
                found.append(Encoded(ids[token:after], weights[token:after]))
            token = after
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        known = [self._words.ids(text) if self._words is not None and text.isascii() else None for text in texts]
        others = [text for text, ids in zip(texts, known, strict=True) if ids is None]
        made = iter(self._backend.encode_batch_fast(others, add_special_tokens=False) if others else ())
        return [next(made).ids if ids is None else ids for ids in known]

    def _stands(self, text: str) -> bool:
        """Whether the tokenizer's normaliser leaves a text unchanged."""
        return not self._is_nfc or text.isascii() or unicodedata.is_normalized("NFC", text)

    def _by_offsets(self, texts: Sequence[Text], *, whole: bool) -> list[Encoded]:
        encodings = self._backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        return [_by_offsets(encoding, text, whole=whole) for encoding, text in zip(encodings, texts, strict=True)]


def _by_offsets(encoding: Any, text: Text, *, whole: bool) -> Encoded:
    ids = np.array(encoding.ids, np.int32)
    weights: np.ndarray = np.full(len(ids), whole, np.float32)
    for start, stop, weight in text.parts:
        first, end = _tokens_of(encoding, start, stop, len(text.text))
        weights[first:end] = weight
    weights[:1] = 0
    return Encoded(ids, weights)


def _tokens_of(encoding: Any, start: int, stop: int, length: int) -> tuple[int, int]:
    """The tokens [first, end) that share a character with the characters [start, stop)."""
    count = len(encoding)
    first = next((t for at in range(start, stop) if (t := encoding.char_to_token(at)) is not None), None)
    if first is None:
        return 0, 0
    after = next((t for at in range(stop, length) if (t := encoding.char_to_token(at)) is not None), count)
    while after < count and encoding.token_to_chars(after)[0] < stop:
        after += 1  # a token that crosses the end of the part
    return first, after


def _byte_lengths(backend: Any) -> np.ndarray | None:
    """Length in bytes of each token, int64 [ids]; None unless tokens are always the text's bytes."""
    added = backend.get_added_tokens_decoder()
    if not _keeps_bytes(backend) or any(token.lstrip or token.rstrip for token in added.values()):
        return None  # such a token swallows the spaces beside it
    vocabulary: Mapping[str, int] = backend.get_vocab(with_added_tokens=False)
    lengths: np.ndarray = np.zeros(max(*vocabulary.values(), *added, 0) + 1, np.int64)
    lengths[list(vocabulary.values())] = list(map(len, vocabulary))  # the vocabulary has one character per byte
    for number, token in added.items():
        lengths[number] = _bytes(token.content)
    return lengths


def _keeps_bytes(backend: Any) -> bool:
    model = backend.model
    if type(model).__name__ != "BPE" or model.unk_token or model.byte_fallback:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if backend.normalizer is not None and type(backend.normalizer).__name__ != "NFC":
        return False
    if backend.pre_tokenizer is None:
        return False
    made = json.loads(backend.pre_tokenizer.__getstate__())
    steps = made["pretokenizers"] if made["type"] == "Sequence" else [made]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    others_keep = all(
        step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
    return len(levels) == 1 and not levels[0]["add_prefix_space"] and others_keep


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
