"""A small tokenizer trained on the spot, and dataset files written by the tests themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.tokens import tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # test modules import chat_templates

TEXTS = [
    "What is two plus two? The answer is four.",
    "How many apples are in the basket? There are seven apples in it.",
    "user assistant system You are a helpful assistant. think about the question, then answer it.",
] * 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer.train_bpe(TEXTS, vocab_size=400, out_dir=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def bpe(tokenizer_folder: Path) -> Any:
    return tokenizer.load(tokenizer_folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[Any]], Path]:
    def write(name: str, rows: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
