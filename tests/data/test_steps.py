"""Rows with labelled steps: TRL's tokens and labels behind the rendered prompt, refusals, and the length limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.steps import RIGHT
from megabatch.data.tokens.tokenizer import load, train_bpe
from megabatch.errors import DataError

ROW: dict[str, Any] = {
    "prompt": "Which is larger, 9.8 or 9.11?", "completions": ["11 > 8.", "So 9.11 > 9.8."], "labels": [True, False],
}  # fmt: skip
ASKED = "<|im_start|>user\nWhich is larger, 9.8 or 9.11?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(["which is larger, so 9.8 or 9.11"], vocab_size=290, out_dir=tmp_path_factory.mktemp("tokenizer"))


def encoded(folder: Path, settings: dict[str, Any] | None = None, **fields: Any) -> Any:
    row = Row(Origin("rows.jsonl", 7, True), fields)
    how = {"step_separator": "\n\n", **(settings or {})}
    return Encoder(Encoding(tokenizer=folder, rows="steps", **how)).encode([row])


def as_trl(tokenizer: Any, prompt: str, row: dict[str, Any], separator: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of TRL 0.29's PRMTrainer for a prompt that already has its first tokens."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    labels = [-100] * len(ids)
    for step, label in zip(row["completions"], row["labels"], strict=True):
        part = tokenizer(step, add_special_tokens=False)["input_ids"]
        part = part + tokenizer.encode(separator, add_special_tokens=False)
        ids, labels = ids + part, labels + [-100] * (len(part) - 1) + [int(label)]
    return ids, labels


@pytest.mark.parametrize("separator", ["\n\n", "<|im_end|>", " step ends here "])
def test_tokens_and_labels_are_those_of_trl(separator: str, folder: Path) -> None:
    (sample,) = encoded(folder, {"step_separator": separator}, **ROW).samples
    tokenizer = load(folder)
    ids, labels = as_trl(tokenizer, ASKED, ROW, separator)
    assert sample.ids.tolist() == [*ids, tokenizer.eos_token_id]
    at = np.flatnonzero(sample.weights)
    own = np.full(len(ids), -100)
    own[at - 1] = sample.token_columns[RIGHT][at]
    assert own.tolist() == labels


def test_prompts_may_be_turns_and_lists_json(folder: Path) -> None:
    (expected,) = encoded(folder, **ROW).samples
    turns = [{"role": "user", "content": ROW["prompt"]}]
    for given in (
        {"prompt": turns},
        {"prompt": None, "messages": turns},
        {"labels": "[1, 0]"},
        {"labels": ["True", "0"]},
    ):
        (sample,) = encoded(folder, **{**ROW, **given}).samples
        assert sample.ids.tolist() == expected.ids.tolist()
        assert (sample.token_columns[RIGHT] == expected.token_columns[RIGHT]).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"labels": [True]}, "rows.jsonl:7: has 2 completions and 1 labels"),
        ({"labels": None}, "rows.jsonl:7: has no labels; give completions"),
        ({"completions": None}, "rows.jsonl:7: has no completions"),
        ({"completions": [], "labels": []}, "rows.jsonl:7: completions must be a list that is not empty"),
        ({"completions": "11 > 8."}, "rows.jsonl:7: completions is not valid JSON"),
        ({"completions": ["a", " \n"]}, r"rows.jsonl:7: completions\[1\] must be a text that is not empty"),
        ({"labels": [1, "yes"]}, r"rows.jsonl:7: labels\[1\] must be true or false"),
        ({"labels": [1, 0.5]}, r"rows.jsonl:7: labels\[1\] must be true or false"),
        ({"labels": [float("nan"), 1]}, r"rows.jsonl:7: labels\[0\] must be true or false"),
        ({"prompt": None}, "rows.jsonl:7: no accepted format"),
        ({"prompt": " \n"}, "rows.jsonl:7: the prompt is empty"),
        ({"images": ["a.png"]}, "rows.jsonl:7: .*images"),
    ],
)
def test_bad_rows_are_refused_with_their_line(fields: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(DataError, match=said):
        encoded(folder, **{**ROW, **fields})


def test_the_length_limit_cuts_prompts_and_never_steps(folder: Path) -> None:
    (whole,) = encoded(folder, **ROW).samples
    answer = len(whole.ids) - len(load(folder)(ASKED, add_special_tokens=False)["input_ids"])
    for limit, strategy, kept in ((answer + 1, "left", 1), (answer, "left", 1), (6, "left", 0), (answer, "delete", 0)):
        found = encoded(folder, {"max_length": limit, "truncation_strategy": strategy}, **ROW)
        assert len(found.samples) == kept, (limit, strategy)
        assert sum(found.dropped.values()) == 1 - kept
        for sample in found.samples:
            assert sample.ids.tolist() == whole.ids[-limit:].tolist()
            assert np.count_nonzero(sample.weights) == 2


def test_steps_that_a_reward_would_cut_in_two_are_counted(folder: Path) -> None:
    found = encoded(folder, **{**ROW, "completions": ["a\n\nb", "c"]})
    assert len(found.samples) == 1
    assert {text: count for text, count in found.remarks.items() if "step_separator" in text} == {
        "steps that contain prm.step_separator: where an answer is cut at it, they are two": 1
    }
