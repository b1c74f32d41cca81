"""Plain texts → token ids, with the special tokens that the tokenizer itself adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megabatch.data.tokens.control_tokens import ESCAPED, ControlTokens
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Encoded
from megabatch.data.tokens.tokenizer import backend


class PlainTexts:
    """The ids of `tokenizer(text)`, except for control tokens in the text (see `control_tokens`)."""

    def __init__(self, tokenizer: Any, encoding: Encoding, *, special_tokens: bool = True) -> None:
        """Args: special_tokens: with those that the tokenizer adds to a text."""
        self._special = special_tokens
        self._backend = backend(tokenizer)
        written = encoding.new_special_tokens
        self._control = ControlTokens(tokenizer, of_the_data=written) if encoding.sanitize_control_tokens else None

    def encode(self, texts: Sequence[str], remarks: Counter[str]) -> list[Encoded]:
        """Samples whose tokens all count."""
        plain = self._backend.encode_batch(list(texts), add_special_tokens=self._special)
        return [weighed(self._ids(text, found.ids, remarks)) for text, found in zip(texts, plain, strict=True)]

    def _ids(self, text: str, ids: list[int], remarks: Counter[str]) -> list[int]:
        control = self._control
        if control is None or not (control.may_be_in(text) and control.are_in(text)):
            return ids
        remarks[ESCAPED] += 1
        twins: list[int] = control.twin.encode(control.spelled(text).text, add_special_tokens=self._special).ids
        return twins


def weighed(ids: Sequence[int]) -> Encoded:
    """A sample with weight 1 for every token but the first, which nothing predicts."""
    weights: np.ndarray = np.ones(len(ids), np.float32)
    weights[:1] = 0
    return Encoded(np.asarray(ids, np.int32), weights)
