"""Prints TRL's tokens for each second of processor time; run by `peers.py` in an interpreter that imports trl."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.started, self.seconds, self.tokens = warm_up, 0.0, 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.process_time() - self.started
        if state.global_step == self.warm_up:
            self.started, self.tokens = time.process_time(), 0


def main(
    rows: str,
    hf: str,
    micro_batch_size: int,
    global_batch_size: int,
    packing_length: int | None,
    lora: dict[str, Any] | None,
    steps: int,
    warm_up: int,
) -> None:
    torch.set_num_threads(1)
    config = SFTConfig(
        output_dir="trl",
        max_steps=warm_up + steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=global_batch_size // micro_batch_size,
        max_length=packing_length or 1024,
        packing=packing_length is not None,
        padding_free=packing_length is not None,
        gradient_checkpointing=False,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    clock = Clock(warm_up)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="sdpa"),
        args=config,
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(hf),
        callbacks=[clock],
        peft_config=None if lora is None else _adapters(**lora),
    )
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *others: Any) -> Any:
        mask = inputs.get("attention_mask")
        clock.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return step(model, inputs, *others)

    trainer.training_step = counted
    trainer.train()
    print(clock.tokens / clock.seconds, flush=True)


def _adapters(lora_rank: int, lora_alpha: int) -> LoraConfig:
    return LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
