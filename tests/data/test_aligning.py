"""Weights from the lengths of byte-level tokens against those from the tokenizer's own offsets."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_exact_ids import QUICK
from tokenizer_kinds import KINDS
from tokenizers import Tokenizer, models, normalizers, processors

from megabatch.data.tokens.aligning import Aligner, Text
from megabatch.data.tokens.sample import Encoded

_PIECES = st.lists(
    st.sampled_from([*"ab ,.'\n<|▁ä𝄞", "the", "  ", "\n\n", "<s>", "<|im_end|>", "e\u0301"]), max_size=12
)


@functools.cache
def aligners(kind: str, *, nfc: bool) -> tuple[Aligner, Aligner]:
    """By bytes, and by offsets."""
    backend = Tokenizer.from_str(KINDS[kind]().backend_tokenizer.to_str())
    if nfc:
        backend.normalizer = normalizers.NFC()
    by_bytes = Aligner(backend)
    whole_offsets = Tokenizer.from_str(backend.to_str())
    whole_offsets.post_processor = processors.ByteLevel(trim_offsets=False)  # Llama 3's leave blanks out
    by_offsets = Aligner(whole_offsets)
    assert by_bytes._lengths is not None
    by_offsets._lengths = None
    return by_bytes, by_offsets


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "llama3"])
@given(texts=st.lists(st.lists(_PIECES.map("".join), min_size=3, max_size=5), min_size=1, max_size=3),
       whole=st.booleans())  # fmt: skip
@QUICK
def test_bytes_tell_what_offsets_tell(kind: str, nfc: bool, texts: list[list[str]], whole: bool) -> None:
    given = [_weighted(pieces) for pieces in texts]
    by_bytes, by_offsets = (aligner.encode(given, whole=whole) for aligner in aligners(kind, nfc=nfc))
    for a, b in zip(by_bytes, by_offsets, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.weights.tolist() == b.weights.tolist()


def _weighted(pieces: list[str]) -> Text:
    """Every second piece is a part."""
    stops = np.cumsum([len(piece) for piece in pieces]).tolist()
    parts = [(stops[i - 1], stops[i], 0.5 * i) for i in range(1, len(pieces), 2)]
    return Text("".join(pieces), parts)


def _tokens(kind: str, encoded: Encoded) -> list[str]:
    tokenizer = _tokenizer(kind)
    return [tokenizer.decode([number]) for number in encoded.ids]


def test_a_blank_before_an_answer_is_learned() -> None:
    (encoded,) = aligners("llama3", nfc=False)[0].encode([Text("two  ,four", [(3, 10, 1.0)])], whole=False)
    learned = [t for t, w in zip(_tokens("llama3", encoded), encoded.weights, strict=True) if w]
    assert "".join(learned) == "  ,four"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("byte_level", "llama3")])
def test_other_kinds_are_asked_for_offsets(kind: str) -> None:
    assert Aligner(KINDS[kind]().backend_tokenizer)._lengths is None


def test_bytes_that_the_vocabulary_lacks_are_noticed() -> None:
    """Byte pairs without an unknown token leave out what they do not know."""
    backend = Tokenizer.from_str(KINDS["byte_level"]().backend_tokenizer.to_str())
    vocabulary = {token: number for token, number in backend.get_vocab().items() if token in (*"ab", "Ġ")}
    backend.model = models.BPE(vocab=vocabulary, merges=[])
    (encoded,) = Aligner(backend).encode([Text("axb ab", [(3, 6, 1.0)])], whole=False)
    assert encoded.weights.tolist() == [0, 0, 1, 1, 1]


@functools.cache
def _tokenizer(kind: str) -> Any:
    return KINDS[kind]()
