from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megabatch.data.tokens import tokenizer
from megabatch.errors import DataError


def test_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    texts = ["two plus two", "four apples, five pears", "two pears"]
    folders = [tokenizer.train_bpe(iter(texts), vocab_size=280, out_dir=tmp_path / name) for name in "ab"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_it_round_trips_any_text_and_keeps_special_tokens_whole(bpe: Any) -> None:
    text = "<|im_start|>user\n日本 ü\tx<|im_end|>\n"
    ids = bpe(text)["input_ids"]
    assert bpe.decode(ids) == text
    assert ids[0] == bpe.convert_tokens_to_ids("<|im_start|>") == 1
    assert bpe.eos_token == "<|im_end|>"
    assert bpe.pad_token == "<|endoftext|>"


def test_it_is_saved_again_by_transformers(bpe: Any, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again("two plus two")["input_ids"] == bpe("two plus two")["input_ids"]
    assert again.chat_template == bpe.chat_template


def test_faults_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"must hold tokenizer\.json, or vocab\.json and merges\.txt, or"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    with pytest.raises(DataError, match=r"cannot be read \(.*download its tokenizer\.json"):
        tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"vocab_size=100 is below .* try 259"):
        tokenizer.train_bpe(["a"], vocab_size=100, out_dir=tmp_path)
    with pytest.raises(DataError, match="needs text"):
        tokenizer.train_bpe([""], vocab_size=300, out_dir=tmp_path)
