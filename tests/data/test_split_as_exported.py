"""Runs split texts as transformers does in the folders that they export, whatever class it reads the tokenizer as."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from runs import recipe, with_fields, write_run
from transformers import AutoTokenizer

from megabatch import Model
from megabatch.config.run import RunConfig
from megabatch.data.run_tokenizer import tokenizer_of
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.trainer.exports.chat import ChatExport

TEXTS = ["89 apples and 1234 pears", "I don't know\n\n  y = 12"]


def ids_of(folder: Path) -> list[list[int]]:
    return [ids for ids in AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that joins digits and says no class, without config.json."""
    made = tokenizers.train_bpe(TEXTS * 8, vocab_size=304, out_dir=tmp_path_factory.mktemp("tokenizer"))
    config = json.loads((made / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def run_of(tmp_path: Path, model: str, **fields: object) -> RunConfig:
    made = with_fields(recipe(tmp_path, model), model=fields)
    return RunConfig.load(write_run(made, tmp_path / "run") / "run.json")


def as_exported(used: Path, out: Path, *, adapter: bool) -> list[list[int]]:
    out.mkdir()
    chat = ChatExport(used, None, has_turns=True)
    chat.write(used, out)
    if adapter:
        chat.keep_class(out)
    else:
        shutil.copy(used / "config.json", out)
    return ids_of(out)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("model", "joins"), [("qwen2", False), ("qwen3", False), ("llama", True)])
def test_of_a_new_model(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, model: str, joins: bool, given: bool, adapter: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        used = tokenizer_of(run_of(tmp_path, model, tokenizer=str(folder) if given else None))
    assert ids_of(used) == as_exported(used, tmp_path / "hf", adapter=adapter)
    if given:
        assert (ids_of(used) == ids_of(folder)) is joins
        assert (
            f"transformers reads {folder} as Qwen2Tokenizer beside a model of type {model}" in caplog.text
        ) is not joins


def test_of_a_given_model_with_another_tokenizer(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "first").mkdir()
    model = tokenizer_of(run_of(tmp_path / "first", "qwen2"))

    def used(name: str, **fields: str) -> Path:
        made = replace(recipe(tmp_path, "qwen2"), model=Model(torch_dtype="float32", **fields))
        return tokenizer_of(RunConfig.load(write_run(made, tmp_path / name) / "run.json"))

    other = used("other", model=str(model), tokenizer=str(folder))
    assert ids_of(other) != ids_of(folder)
    whole = shutil.copytree(folder, tmp_path / "whole")
    shutil.copy(model / "config.json", whole)
    assert ids_of(other) == ids_of(whole)
    assert used("own", model=str(whole)) == whole
    assert used("alike", model=str(model), tokenizer=str(whole)) == whole, "its class is the same beside both"
