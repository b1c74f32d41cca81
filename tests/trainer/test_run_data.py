"""What a run draws from its data: whole epochs, the same samples as before, ids that the model has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_dataset, write_run

from megabatch import Model
from megabatch.run_directory import ExitCode


def train_or_refuse(run_dir: str, stop_after: int | None = None) -> tuple[int, str]:
    """Exit code of a rank, and what it was refused for."""
    from megabatch.errors import MegabatchError
    from megabatch.trainer import failures

    try:
        return train(run_dir, stop_after), ""
    except MegabatchError as error:
        return int(failures.report(error)), str(error)


def test_epochs_run_on_over_their_ends_and_resume_in_the_middle(ranks: RankServer, tmp_path: Path) -> None:
    """10 samples in batches of 4 for 3 epochs: 30 // 4 = 7 steps; the 3rd holds the last 2 of the first epoch."""
    write_dataset(tmp_path / "train.jsonl", samples=10)
    write_dataset(tmp_path / "validation.jsonl", samples=2)
    groups: dict[str, Any] = {"training": {"train_iters": None, "max_epochs": 3}, "batch": {"global_batch_size": 4}}
    whole = write_run(recipe(tmp_path, "qwen3", **groups), tmp_path / "whole")
    assert ranks.run(train, world_size=1, run_dir=str(whole)) == [ExitCode.DONE]
    assert [(line["step"], line["epoch"]) for line in metrics(whole)] == [
        (step, pytest.approx(step * 4 / 10)) for step in range(1, 8)
    ]
    cut = write_run(recipe(tmp_path, "qwen3", **groups), tmp_path / "cut")
    assert ranks.run(train, world_size=1, run_dir=str(cut), stop_after=3) == [ExitCode.REQUEUE]
    assert ranks.run(train, world_size=1, run_dir=str(cut)) == [ExitCode.DONE]
    assert curve(cut) == curve(whole)


def test_a_dataset_edited_at_equal_lengths_is_not_resumed(ranks: RankServer, tmp_path: Path) -> None:
    run = write_run(recipe(tmp_path, "qwen3"), tmp_path / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [ExitCode.REQUEUE]
    data = tmp_path / "train.jsonl"
    data.write_text(re.sub(r"What is (\d+) \+ (\d+)", r"What is \2 + \1", data.read_text()))  # as many tokens
    [(code, error)] = ranks.run(train_or_refuse, world_size=1, run_dir=str(run))
    assert (code, len(metrics(run))) == (ExitCode.CONFIG, 2)
    assert "every sample has the same length" in error, error
    trainer = run / "checkpoints" / "step_00000002" / "trainer.json"
    saved = json.loads(trainer.read_text())
    assert saved["cursor"]["data"].count(":") == 1


@pytest.mark.parametrize("tp", [1, 2])
def test_a_token_without_an_embedding_ends_the_run_before_its_first_step(
    ranks: RankServer, tmp_path: Path, tp: int
) -> None:
    """432 rows, which tp 2 pads to more, and a tokenizer with more ids than that."""
    from transformers import AutoTokenizer

    groups: dict[str, Any] = {"parallel": {"tensor_model_parallel_size": tp}, "resources": {"tasks_per_node": tp}}
    first = write_run(recipe(tmp_path, "qwen3", **groups, training={"train_iters": 1}), tmp_path / "first")
    assert set(ranks.run(train, world_size=tp, run_dir=str(first))) == {ExitCode.DONE}
    model = first / "checkpoints" / "step_00000001" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<extra{number}>" for number in range(rows - len(tokenizer) + 8)])
    tokenizer.save_pretrained(tmp_path / "grown")
    last = tokenizer.convert_ids_to_tokens(rows)
    data = tmp_path / "train.jsonl"
    lines = data.read_text().splitlines()
    lines[6] = json.dumps({"query": "What?", "response": f"It is {last}."})
    data.write_text("\n".join(lines) + "\n")
    given = Model(model=str(model), tokenizer=str(tmp_path / "grown"), torch_dtype="float32")
    run = write_run(replace(recipe(tmp_path, "qwen3", **groups), model=given), tmp_path / "run")
    for code, error in ranks.run(train_or_refuse, world_size=tp, run_dir=str(run)):
        assert code == ExitCode.CONFIG
        assert f"train.jsonl:7: contains the token '{last}' with id {rows}" in error
        assert f"the model's embedding has {rows} rows" in error
    assert not (run / "metrics.jsonl").exists() or not metrics(run)


def train_with_cache(run_dir: str, cache: str) -> int:
    import os

    os.environ["MEGABATCH_CACHE"] = cache
    return train(run_dir)


@pytest.mark.parametrize("given", [False, True])
def test_a_run_finds_what_was_prepared(ranks: RankServer, tmp_path: Path, given: bool) -> None:
    """With a tokenizer trained on the data, and with a model's own."""
    made = recipe(tmp_path, "qwen3", training={"train_iters": 1})
    if given:
        first = write_run(made, tmp_path / "first")
        assert ranks.run(train, world_size=1, run_dir=str(first)) == [ExitCode.DONE]
        folder = first / "checkpoints" / "step_00000001" / "hf"
        made = replace(made, model=Model(model=str(folder), torch_dtype="float32"))
    cache = tmp_path / "cache"
    run = write_run(made, tmp_path / "run")
    prepared = write_run(made, tmp_path / "prepared")
    environment = {**os.environ, "MEGABATCH_CACHE": str(cache)}
    command = [sys.executable, "-X", "importtime", "-m", "megabatch.data.prepare", str(prepared / "run.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "1 steps; an epoch draws all 64 samples, " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "megabatch.data.schedule" in imported
    assert not {name for name in imported if name.startswith(("megatron", "megabatch.trainer.ranks"))}
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*") if not path.name.startswith(".")}
    assert len(before) == 14
    assert ranks.run(train_with_cache, world_size=1, run_dir=str(run), cache=str(cache)) == [ExitCode.DONE]
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*") if not path.name.startswith(".")}
    assert after == before


def test_samples_of_similar_length_are_drawn_together_and_resumed(ranks: RankServer, tmp_path: Path) -> None:
    groups: dict[str, Any] = {"data": {"group_by_length": True}, "training": {"train_iters": 6}}
    whole = write_run(recipe(tmp_path, "qwen2", **groups), tmp_path / "whole")
    assert ranks.run(train, world_size=1, run_dir=str(whole)) == [ExitCode.DONE]
    cut = write_run(recipe(tmp_path, "qwen2", **groups), tmp_path / "cut")
    assert ranks.run(train, world_size=1, run_dir=str(cut), stop_after=3) == [ExitCode.REQUEUE]
    assert ranks.run(train, world_size=1, run_dir=str(cut)) == [ExitCode.DONE]
    assert curve(cut) == curve(whole)
    tokens = [line["tokens"] for line in metrics(whole)]
    assert tokens[0] > max(tokens[1:]), "the longest come first"


def test_one_pass_draws_every_sample_once(ranks: RankServer, tmp_path: Path) -> None:
    write_dataset(tmp_path / "train.jsonl", samples=16)
    write_dataset(tmp_path / "validation.jsonl", samples=2)
    once: dict[str, Any] = {"data": {"dataloader_type": "single", "dataset_shuffle": False}}
    run = write_run(recipe(tmp_path, "qwen2", **once, training={"train_iters": 2}), tmp_path / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [ExitCode.DONE]
    run = write_run(recipe(tmp_path, "qwen2", **once, training={"train_iters": 3}), tmp_path / "more")
    [(code, error)] = ranks.run(train_or_refuse, world_size=1, run_dir=str(run))
    assert code == ExitCode.CONFIG
    assert "draws the 16 samples of the training data once, which are 2 steps" in error
