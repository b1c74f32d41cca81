"""What ends a completion, from a tokenizer, a chat template and the model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from megabatch.errors import DataError
from megabatch.trainer.rl.prompts import stop_ids_of


class Tokenizer:
    """Of 100 tokens, `<eot>` the ninth."""

    eos_token_id = 5

    def __len__(self) -> int:
        return 100

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<eot>": 9}[token]


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        (None, None, (5, 9)),
        ({"eos_token_id": [7, 5, 8]}, {"eos_token_id": 3}, (5, 7, 8, 9)),
        ({"eos_token_id": 7}, None, (5, 7, 9)),
        ({"temperature": 0.6}, {"eos_token_id": 3}, (3, 5, 9)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, (3, 4, 5, 9)),
        ({"eos_token_id": [100, -1]}, {}, (5, 9)),
    ],
)
def test_every_end_that_is_declared_ends_a_completion(
    generation: dict[str, Any] | None, model: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", model)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert stop_ids_of(Tokenizer(), "<eot>", tmp_path) == expected
    if generation is not None and generation.get("eos_token_id") == [7, 5, 8]:
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [7, 5, 8], "as transformers reads it"


def test_without_a_turn_it_is_the_end_of_a_text(tmp_path: Path) -> None:
    assert stop_ids_of(Tokenizer(), None, tmp_path) == (5,)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config.json is not valid JSON"):
        stop_ids_of(Tokenizer(), "<eot>", tmp_path)
