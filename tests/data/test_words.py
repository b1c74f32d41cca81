"""Ids of words that are looked up, against the tokenizer's own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_exact_ids import QUICK
from tokenizer_kinds import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megabatch.data.tokens import words
from megabatch.data.tokens.aligning import Aligner, Text
from megabatch.data.tokens.words import Words, in_ascii, words_of

CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN = rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{CONTRACTED}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS = r" ?\p{L}+"
"""Leaves characters out, which are words of their own."""
PATTERNS = {"gpt2": None, "qwen": QWEN, "llama3": LLAMA3, "o200k": O200K, "letters": LETTERS}
ADDED = ("<|im_end|>", "<|im|>", "<|im_end", "<think>")
_TEXTS = st.lists(
    st.sampled_from(
        [*map(chr, range(128)), *ADDED, "it's", "IT'S", "'Re", "  ", " \n\n ", "12345", "the apples", "ä"]
    ),
    max_size=20,
).map("".join)


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    pattern = PATTERNS[name]
    raw = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if pattern is None:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    raw.add_tokens([AddedToken(token, special=token != "<think>", normalized=False) for token in ADDED])
    return raw


@functools.cache
def aligner(name: str) -> Aligner:
    found = Aligner(tokenizer(name))
    assert isinstance(found._words, Words)
    return found


@pytest.mark.parametrize("name", PATTERNS)
@given(texts=st.lists(_TEXTS, min_size=1, max_size=4))
@QUICK
def test_ids_are_those_of_the_tokenizer(name: str, texts: list[str]) -> None:
    expected = tokenizer(name).encode_batch_fast(texts, add_special_tokens=False)
    found = aligner(name).encode([Text(text, []) for text in texts], whole=True)
    assert [one.ids.tolist() for one in found] == [one.ids for one in expected]


def test_few_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    found = words_of(tokenizer("gpt2"))
    assert found is not None
    text = "one two three four five two one " + "x" * 100
    assert found.ids(text) == tokenizer("gpt2").encode(text, add_special_tokens=False).ids
    assert 0 < len(found) <= 3 and not any(len(word) > 64 for word in found)


@pytest.mark.parametrize(
    "pattern", [r"\p{P}+", r"\p{M}+", r"^a", r"[\s-\p{L}]", r"\d+", r"\p{N}{1,3}+", r"[a&&b]", r"\w"]
)
def test_a_pattern_that_may_mean_something_else_is_not_used(pattern: str) -> None:
    assert in_ascii(pattern) is None


def test_tokens_that_act_otherwise_are_left_to_the_tokenizer() -> None:
    def of(**fields: Any) -> Words | None:
        raw = Tokenizer.from_str(tokenizer("gpt2").to_str())
        raw.add_tokens([AddedToken("new", **fields)])
        return words_of(raw)

    assert of(normalized=False) is not None
    assert of(normalized=True) is None and of(normalized=False, single_word=True) is None
