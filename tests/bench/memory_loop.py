"""Writes how far a rank's memory rises in a few steps; run by `memory.py`, as FOLDER ANSWER KIND on each rank."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from made_runs import SMALL, recipe, write_run
from measure import Figure, answer, peak_memory, sized
from memory import LONG, VECTORS

from megabatch import Recipe
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.loop import open_loop
from megabatch.trainer.signals import StopSignal

VOCAB = sized(151_936, 512)
TOP = 64
STEPS = 2


def made(folder: Path, kind: str, ranks: int) -> Recipe:
    """One row of `LONG` tokens at a time, or all of a rank's vectors at once."""
    rows = {"dataset": [str(folder / "rows.jsonl")], "num_workers": 0, "columns": {"positive": "_"}}
    common: dict[str, Any] = {
        "recompute": {"recompute_granularity": "none"},
        "kernels": {"transformer_impl": "local"},
        "resources": {"tasks_per_node": ranks},
    }
    if kind == "infonce":
        common["data"] = {**rows, "max_length": 64, "columns": {"response": "_"}}
        common["batch"] = {"micro_batch_size": VECTORS, "global_batch_size": VECTORS * ranks}
        common["training"] = {"task_type": "embedding"}
        return replace(recipe(folder, SMALL, **common), task="sft")
    common["data"] = {**rows, "max_length": LONG}
    common["batch"] = {"micro_batch_size": 1, "global_batch_size": 1}
    model = {**SMALL, "num_layers": 2, "padded_vocab_size": VOCAB}
    found = recipe(folder, model, **common)
    if kind == "sft":
        return replace(found, task="sft")
    gkd = {"teacher_model": str(teacher(folder)), "gkd_logits_topk": min(TOP, VOCAB), "lmbda": 0.0}
    return replace(found, task="rlhf", rlhf=replace(found.rlhf, rlhf_type="gkd"), gkd=replace(found.gkd, **gkd))


def teacher(folder: Path) -> Path:
    """Another random model with the same vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megabatch.data.tokens.tokenizer import train_bpe

    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=SMALL["hidden_size"], intermediate_size=SMALL["ffn_hidden_size"],
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
        max_position_embeddings=max(LONG, 256),
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "teacher")
    train_bpe(["a small text"], vocab_size=300, out_dir=folder / "teacher")
    return folder / "teacher"


def main(folder: str, path: str, kind: str) -> None:
    torch.set_num_threads(1)
    ranks_wanted, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    run = write_run(made(Path(folder), kind, ranks_wanted), Path(folder) / f"{kind}-{ranks_wanted}-{rank}")
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        with loop.metrics, peak_memory() as peak:
            for _ in islice(loop.steps(progress), STEPS):
                pass
    note = f"{LONG} tokens, a vocabulary of {VOCAB:,}" if kind != "infonce" else f"{VECTORS} pairs a rank"
    if rank == 0:
        answer([Figure(name=kind, value=peak.mib, unit="MiB", note=note)], path)


if __name__ == "__main__":
    main(*sys.argv[1:])
