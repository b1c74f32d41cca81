"""Tokens added to a tokenizer's files: what transformers makes of them, and what the data may write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.cache.cache_key import tokenizer_digest
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens import new_tokens, tokenizer
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError

TOKENS = ("<loc_1>", "<loc_10>", "Ünïcode|>")


@pytest.fixture
def extended(tokenizer_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "extended"
    shutil.copytree(tokenizer_folder, folder)
    new_tokens.write_with(tokenizer_folder, TOKENS, folder)
    return folder


def test_transformers_adds_the_same_ones(tokenizer_folder: Path, extended: Path) -> None:
    theirs: Any = tokenizer.load(tokenizer_folder)
    before = len(theirs)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *TOKENS]})
    own: Any = tokenizer.load(extended)
    assert new_tokens.rows_with(tokenizer_folder, TOKENS) == len(own) == len(theirs) == before + len(TOKENS)
    text = "a <loc_10>b<loc_1><|im_start|> Ünïcode|>x"
    assert own(text)["input_ids"] == theirs(text)["input_ids"]
    assert set(own.all_special_tokens) == set(theirs.all_special_tokens)
    assert own.decode(own(text)["input_ids"], skip_special_tokens=True) == "a b x"
    assert own.chat_template == theirs.chat_template


def test_every_file_that_lists_added_tokens_gets_them(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Those of older versions of transformers too."""
    folder = tmp_path / "old"
    shutil.copytree(tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    known = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added = {token["content"]: token["id"] for token in known}
    config["added_tokens_decoder"] = {str(token["id"]): token for token in known}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_start|>"]}))
    new_tokens.write_with(folder, TOKENS, folder)
    ids = dict(zip(TOKENS, range(new_tokens._known(folder).following - 3, 10**6), strict=False))
    read = {name: json.loads((folder / name).read_text()) for name in (
        "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json")}  # fmt: skip
    assert read["added_tokens.json"] == {**added, **ids}
    assert read["special_tokens_map.json"]["additional_special_tokens"] == ["<|im_start|>", *TOKENS]
    decoder = read["tokenizer_config.json"]["added_tokens_decoder"]
    assert {token: decoder[str(number)]["content"] for token, number in ids.items()} == {t: t for t in TOKENS}
    own: Any = tokenizer.load(folder)
    assert own.convert_tokens_to_ids(list(TOKENS)) == list(ids.values())


def test_the_cache_key_knows_them(tokenizer_folder: Path, extended: Path, tmp_path: Path) -> None:
    digests = Digests(tmp_path)
    assert tokenizer_digest(extended, digests) != tokenizer_digest(tokenizer_folder, digests)


@pytest.mark.parametrize("rows", ["conversations", "documents"])
def test_the_data_writes_them_and_no_other_control_tokens(extended: Path, rows: Any) -> None:
    said = "at <loc_10>and<|im_end|><loc_1>"
    fields = {"text": said} if rows == "documents" else {"query": "Q <loc_1>", "response": said}
    encoding = Encoding(tokenizer=extended, rows=rows, new_special_tokens=TOKENS)
    (sample,) = Encoder(encoding).encode([Row(Origin("x.jsonl", 1), fields)]).samples
    own: Any = tokenizer.load(extended)
    small, large, end = own.convert_tokens_to_ids(["<loc_1>", "<loc_10>", "<|im_end|>"])
    ids = sample.ids.tolist()
    assert (ids.count(small), ids.count(large)) == (1 if rows == "documents" else 2, 1)
    learned = [number for number, weight in zip(ids, sample.weights, strict=True) if weight]
    assert learned[-2:] == [small, end], "an answer that ends with a new token still learns to end its turn"
    assert ids.count(end) == (1 if rows == "documents" else 2), "the template's own"


def test_a_token_of_the_template_controls_as_others_do(extended: Path) -> None:
    source = "{% for m in messages %}<loc_10>{{ m.role }}\n{{ m.content }}<loc_1>{% endfor %}"
    config = json.loads((extended / "tokenizer_config.json").read_text())
    (extended / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": source}))
    encoding = Encoding(tokenizer=extended, new_special_tokens=TOKENS)
    row = Row(Origin("x.jsonl", 1), {"query": "a <loc_1> b", "response": "yes"})
    chunk = Encoder(encoding).encode([row])
    own: Any = tokenizer.load(extended)
    small, large = own.convert_tokens_to_ids(["<loc_1>", "<loc_10>"])
    (sample,) = chunk.samples
    assert (sample.ids.tolist().count(small), sample.ids.tolist().count(large)) == (2, 2)
    assert sample.ids[-1] == small and sample.weights[-1] == 1
    assert sum(chunk.remarks.values()) == 1, "it says that it read one as text"


def test_tokens_from_files(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<a>\n\n  <b> \n", encoding="utf-8-sig")
    assert new_tokens.listed(["<c>", str(tmp_path / "tokens.txt")]) == ("<c>", "<a>", "<b>")


def test_faults_are_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "words.txt").write_text("<a> <b>\n")
    (tmp_path / "latin.txt").write_bytes("<ä>".encode("latin-1"))
    for given, fault in {
        ("<a>", "<b>", "<a>"): "'<a>' is given twice",
        ("",): "'' is no token",
        (str(tmp_path / "empty.txt"),): "empty.txt is empty; give a file with one token per line",
        (str(tmp_path / "words.txt"),): "'<a> <b>' is no token: it must have characters, and no white space",
        (str(tmp_path / "none.txt"),): "none.txt cannot be read (No such file or directory)",
        (str(tmp_path / "pipe.txt"),): "pipe.txt is not a regular file; give one with one token per line",
        (str(tmp_path / "latin.txt"),): "latin.txt is not UTF-8 text",
    }.items():
        with pytest.raises(DataError) as error:
            new_tokens.listed(given)
        assert fault in str(error.value) and str(error.value).startswith("model.new_special_tokens: ")
    with pytest.raises(DataError, match=r"'<\|im_end\|>' is a token of .* already, with id 2 \(and 1 more\); leave"):
        new_tokens.rows_with(tokenizer_folder, ["<x>", "<|im_end|>", "a"])
    with pytest.raises(DataError, match=r"has no tokenizer\.json, to which tokens could be added"):
        new_tokens.rows_with(tmp_path, ["<x>"])


def test_a_new_tokenizer_has_them_from_the_start(tmp_path: Path) -> None:
    own: Any = tokenizer.load(tokenizer.train_bpe(["a b <loc_1>"], vocab_size=300, out_dir=tmp_path, further=TOKENS))
    assert own.convert_tokens_to_ids(list(TOKENS)) == [3, 4, 5]
    assert set(TOKENS) <= set(own.all_special_tokens) and own("<loc_10>")["input_ids"] == [4]
