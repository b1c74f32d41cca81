from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megabatch.data.cache import datasets
from megabatch.data.tokens.encoding import Encoding
from megabatch.errors import DataError

Write = Callable[..., Path]


@pytest.fixture
def grown(tokenizer_folder: Path, tmp_path: Path) -> tuple[Path, int]:
    """A tokenizer with two tokens more than the model has rows, and the rows."""
    folder = tmp_path / "grown"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<more>", "<most>"])
    tokenizer.save_pretrained(folder)
    return folder, rows


def texts(kind: str, *answers: str) -> list[dict[str, Any]]:
    return [{"text": answer} if kind == "documents" else {"query": "Q", "response": answer} for answer in answers]


@pytest.mark.parametrize("kind", ["conversations", "documents"])
@pytest.mark.parametrize("where", ["dataset", "val_dataset"])
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_a_token_that_the_model_does_not_have_is_named(
    grown: tuple[Path, int], tmp_path: Path, write_jsonl: Write, kind: Any, where: str, start: str
) -> None:
    folder, rows = grown
    good = write_jsonl("good.jsonl", texts(kind, "apple", "two"))
    bad = write_jsonl("bad.jsonl", texts(kind, "apple", "a <most> b", "<more> c", "two"))
    data = {"dataset": [str(good)], "val_dataset": [str(good)], where: [str(bad)]}
    encoding = Encoding(tokenizer=folder, rows=kind)
    cache_dir = tmp_path / "cache"
    datasets.build(encoding, vocab_size=rows, cache_dir=cache_dir, dataset=[str(good)])  # unused ids may lie above
    if start == "warm":
        datasets.build(encoding, vocab_size=rows + 2, cache_dir=cache_dir, **data)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: contains the token .<most>. with id") as caught:
        datasets.build(encoding, vocab_size=rows, cache_dir=cache_dir, **data)
    for said in (f"id {rows + 1}, ", f"has {rows} rows", "(2 samples", f"at least {rows + 2} rows"):
        assert said in str(caught.value)
