"""Prints the processor seconds and tokens of a step of TRL's GRPOTrainer or DPOTrainer; run by `aligned_peers.py`."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.started, self.seconds, self.tokens = warm_up, 0.0, 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.process_time() - self.started
        if state.global_step == self.warm_up:
            self.started, self.tokens = time.process_time(), 0


def repetition(completions: list[str], **_: Any) -> list[float]:
    """The share of three-word phrases that occurred before, below 0: the reward of the other side."""
    found = []
    for text in completions:
        words = re.split(r"\s+", text.lower().strip())
        phrases = [tuple(words[first : first + 3]) for first in range(len(words) - 2)]
        found.append(-(1 - len(set(phrases)) / len(phrases)) if phrases else 0.0)
    return found


def main(
    kind: str,
    rows: str,
    hf: str,
    completion: int,
    padding_free: bool,
    micro_batch_size: int,
    global_batch_size: int,
    steps: int,
    warm_up: int,
) -> None:
    torch.set_num_threads(1)
    common: dict[str, Any] = {
        "output_dir": "trl", "max_steps": warm_up + steps, "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": global_batch_size // micro_batch_size, "gradient_checkpointing": False,
        "optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "logging_steps": 10, "save_strategy": "no", "report_to": [], "bf16": False, "use_cpu": True,
        "dataloader_num_workers": 0, "disable_tqdm": True,
    }  # fmt: skip
    clock = Clock(warm_up)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer.chat_template = None
    data = load_dataset("json", data_files=rows, split="train")
    data = data.map(lambda row: {"prompt": f"User: {row['prompt'].strip()}\nAssistant: "})  # our plain template's
    given: dict[str, Any] = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [clock]}
    if kind == "grpo":
        arguments = GRPOConfig(
            **common,
            num_generations=8,
            max_completion_length=completion,
            temperature=1.0,
            beta=0.04,
            loss_type="grpo",
            generation_kwargs={"min_new_tokens": completion},
        )
        given["train_dataset"] = data.select_columns(["prompt"])
        trainer: Any = GRPOTrainer(model=model, reward_funcs=repetition, args=arguments, **given)
    else:
        trainer = DPOTrainer(model=model, args=DPOConfig(**common, max_length=512, padding_free=padding_free), **given)
    loss = trainer.compute_loss

    def counted(model: Any, inputs: Any, *others: Any, **more: Any) -> Any:
        if "prompt_mask" in inputs:
            clock.tokens += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        else:
            mask = inputs.get("attention_mask")
            clock.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return loss(model, inputs, *others, **more)

    trainer.compute_loss = counted
    trainer.train()
    print(json.dumps({"seconds": clock.seconds / steps, "tokens": clock.tokens / steps}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
