"""A reward model on the trainer: the same numbers in another layout, and an export that transformers scores with."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from headed import GROUPS, merged
from rank_server import RankServer
from runs import metrics, recipe, train, write_run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megabatch import Recipe, Rlhf
from megabatch.data.tokens.tokenizer import train_bpe

RM: dict[str, dict[str, Any]] = {
    "rm": {"center_rewards_coefficient": 0.05},
    "training": {"train_iters": 3},
    "batch": {"micro_batch_size": 1, "global_batch_size": 2},
    "data": {"packing": True, "packing_length": 160},
    "evaluation": {"eval_interval": 3},
    # with larger steps the third one's gradient grows sevenfold, and a layout's rounding with it
    "learning_rate": {"lr": 2e-3, "min_lr": 2e-3},
}


def write_pairs(path: Path, *, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = draw.randint(0, 99), draw.randint(0, 99)
            row = {
                "query": f"{a} + {b}?",
                "response": f"It is {a + b}.",
                "rejected_response": "no " * draw.randint(1, 4),
            }
            file.write(json.dumps({**row, "margin": draw.random()}) + "\n")
    return path


def made(folder: Path, ranks: int, *, model: str = "qwen2", **groups: dict[str, Any]) -> Recipe:
    files = {"dataset": [str(folder / "train.jsonl")], "val_dataset": [str(folder / "validation.jsonl")]}
    groups = {name.rstrip("_"): fields for name, fields in groups.items()}
    every = merged(merged(merged(GROUPS, RM), groups), {"resources": {"tasks_per_node": ranks}, "data": files})
    return replace(recipe(folder, model, **every), task="rlhf", rlhf=Rlhf(rlhf_type="rm"))


def test_layouts_and_transformers_agree_on_rewards(ranks: RankServer, tmp_path: Path) -> None:
    write_pairs(tmp_path / "train.jsonl", count=24, seed=0)
    pairs = write_pairs(tmp_path / "validation.jsonl", count=5, seed=1)
    one = write_run(made(tmp_path, 1), tmp_path / "one")
    assert ranks.run(train, world_size=1, run_dir=str(one)) == [0]
    two = write_run(made(tmp_path, 2, parallel={"context_parallel_size": 2}), tmp_path / "two")
    assert ranks.run(train, world_size=2, run_dir=str(two)) == [0, 0]
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(two, kind), metrics(one, kind), strict=True):
            for name in expected.keys() & {"loss", "grad_norm", "eval_loss", "eval_margin", "mean_reward"}:
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-5), (kind, name)
    (folder,) = (one / "checkpoints").glob("step_*/hf")
    rewards = [_rewards(folder, json.loads(line)) for line in pairs.read_text().splitlines()]
    last = metrics(one, "eval")[-1]
    assert last["eval_margin"] == pytest.approx(sum(a - b for a, b in rewards) / len(rewards), rel=1e-4, abs=1e-6)
    assert last["eval_accuracy"] == sum(a > b for a, b in rewards) / len(rewards)


ENDING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
"""Conversations end with the token that ends a text, as Llama 3's do."""


@pytest.mark.parametrize("padding", [None, "<|im_end|>"])
def test_transformers_reads_the_trained_place_where_padding_would_end_a_text(
    padding: str | None, ranks: RankServer, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "train.jsonl", count=8, seed=0)
    pairs = write_pairs(tmp_path / "validation.jsonl", count=5, seed=1)
    tokenizer = train_bpe(["It is no + ?"], vocab_size=270, out_dir=tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    changed = {**settings, "pad_token": padding, "chat_template": ENDING}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(changed))
    run = write_run(made(tmp_path, 1, model_={"tokenizer": str(tokenizer)}), tmp_path / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    (folder,) = (run / "checkpoints").glob("step_*/hf")
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|endoftext|>"
    rewards = [_rewards(folder, json.loads(line)) for line in pairs.read_text().splitlines()]
    mean = sum(a - b for a, b in rewards) / len(rewards)
    assert metrics(run, "eval")[-1]["eval_margin"] == pytest.approx(mean, rel=1e-4, abs=1e-6)


def test_adapters_in_a_pipeline(ranks: RankServer, tmp_path: Path) -> None:
    write_pairs(tmp_path / "train.jsonl", count=16, seed=0)
    write_pairs(tmp_path / "validation.jsonl", count=3, seed=1)
    sizes = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    groups = {"tuner": {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}}
    small: dict[str, Any] = {
        **groups,
        "batch": {"global_batch_size": 4},
        "data": {"packing": False, "packing_length": None},
    }
    small["checkpoint"] = {"no_save_optim": True}
    one = write_run(made(tmp_path, 1, **small), tmp_path / "one")
    two = write_run(made(tmp_path, 2, **small, parallel=sizes), tmp_path / "two")
    assert ranks.run(train, world_size=1, run_dir=str(one)) == [0]
    assert ranks.run(train, world_size=2, run_dir=str(two)) == [0, 0]
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(two, kind), metrics(one, kind), strict=True):
            for key in expected.keys() & {"loss", "grad_norm", "accuracy", "margin", "eval_loss", "eval_margin"}:
                assert found[key] == pytest.approx(expected[key], rel=2e-5, abs=1e-5), (kind, key)


def _rewards(folder: Path, row: dict[str, Any]) -> tuple[float, float]:
    """Of the chosen and the rejected answer, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for answer in (row["response"], row["rejected_response"]):
        turns = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": answer}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    assert model.config.pad_token_id == tokenizer.pad_token_id
    found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    return float(found[0]), float(found[1])
