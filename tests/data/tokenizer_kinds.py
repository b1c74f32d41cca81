"""Small tokenizers of the kinds that real models have, trained on the spot, with the tokens of all families."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from chat_templates import FAMILY_ADDED, FAMILY_SPECIAL
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is two plus two? The answer is four. It isn't five, is it?",
    "How many apples are in the basket? There are seven apples in it.",
    "user assistant system model You are a helpful assistant. think about the question,\n\nthen answer it.",
    'name arguments type function parameters {"name": "add", "arguments": {"a": 2}} content call_id',
    "<s> </s> < s > im_start end ▁ a  b   c \n\n ä ö ü",
] * 4


def _wrapped(raw: Tokenizer) -> Any:
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in FAMILY_SPECIAL])
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in FAMILY_ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _adds_bos(raw: Tokenizer) -> None:
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )


def byte_level() -> Any:
    """GPT-2's and Qwen's: bytes, split by a pattern; no BOS."""
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"'s|'t|\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return _wrapped(raw)


def llama3() -> Any:
    """The same with whole words taken from the vocabulary unmerged, offsets without spaces, and BOS."""
    tokenizer = byte_level()
    raw = tokenizer.backend_tokenizer
    raw.model.ignore_merges = True
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "normalizer":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    made = json.loads(raw.to_str())
    vocabulary = made["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    raw = Tokenizer.from_str(json.dumps(made))
    _adds_bos(raw)
    return raw


def llama2() -> Any:
    """SentencePiece's BPE with fallback to bytes: a space before each text, also after every special token."""
    return _wrapped(_metaspace("normalizer"))


def mistral() -> Any:
    """The same with a space before the first text alone."""
    return _wrapped(_metaspace("first"))


def unigram() -> Any:
    """SentencePiece's unigram model, whose vocabulary holds its own special tokens as pieces."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    _adds_bos(raw)
    return _wrapped(raw)


def word_piece() -> Any:
    """BERT's: lower case, no spaces, unknown words."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    return _wrapped(raw)


KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "llama3": llama3,
    "llama2": llama2,
    "mistral": mistral,
    "unigram": unigram,
    "word_piece": word_piece,
}
