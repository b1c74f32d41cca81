"""`recipes/gsm8k_lora.py` on two processes: adapters learn, and `peft` finds the loss that the trainer found."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rank_server import RankServer
from runs import evaluations, train, with_fields, write_run

from megabatch import Recipe
from megabatch.cli.recipe_file import load_recipe
from megabatch.run_directory import RunDirectory

RECIPE = Path(__file__).parents[3] / "recipes" / "gsm8k_lora.py"
STEPS = 16


def write_problems(path: Path, *, rows: int, seed: int) -> Path:
    """Word problems in GSM8K's form."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            one, two = rng.randint(2, 40), rng.randint(2, 40)
            question = f"Ann has {one} apples and buys {two} more. How many apples has Ann?"
            answer = f"Ann has {one} + {two} = <<{one}+{two}={one + two}>>{one + two} apples.\n#### {one + two}"
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return path


def recipe_on(train_set: Path, held_out: Path) -> Recipe:
    data = {"dataset": [str(train_set)], "val_dataset": [str(held_out)], "split_dataset_ratio": 0.0}
    return with_fields(load_recipe(RECIPE)(), data=data)


def loss_in_peft(adapter: Path, held_out: Path, *, longest: int) -> float:
    """Mean over the tokens of the answers, with everything from the adapter's folder and the base that it names."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    total, count = 0.0, 0
    for row in map(json.loads, held_out.read_text(encoding="utf-8").splitlines()):
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        asked = _ids(tokenizer, turns[:1], add_generation_prompt=True)
        whole = _ids(tokenizer, turns)
        end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)  # a template may write a line break behind it
        if end > longest:
            continue
        with torch.no_grad():
            logps = model(torch.tensor([whole[:end]])).logits[0].double().log_softmax(-1)
        answer = range(len(asked), end)
        total -= sum(float(logps[place - 1, whole[place]]) for place in answer)
        count += len(answer)
    return total / count


def _ids(tokenizer: Any, turns: list[dict[str, str]], **more: Any) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, **more)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_held_out_loss_falls_and_is_that_of_peft(ranks: RankServer, tmp_path: Path) -> None:
    held_out = write_problems(tmp_path / "test.jsonl", rows=24, seed=1)
    made = with_fields(
        recipe_on(write_problems(tmp_path / "train.jsonl", rows=300, seed=0), held_out),
        training={"train_iters": STEPS},
        evaluation={"eval_interval": STEPS},
        checkpoint={"save_interval": STEPS},
    )
    run = write_run(made, tmp_path / "run")
    assert set(ranks.run(train, world_size=2, run_dir=str(run))) == {0}
    (_, before), (_, after) = evaluations(run)
    assert after < before - 1
    adapter = RunDirectory(run).step(STEPS) / "hf"
    assert loss_in_peft(adapter, held_out, longest=512) == pytest.approx(after, rel=1e-4)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(run / "model")
