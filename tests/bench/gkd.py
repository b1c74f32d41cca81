"""Peak memory of a step of distillation over a large vocabulary against a step of SFT, on the same rows.

What a step adds to what the process has before it: activations, logits, their gradient, and what the loss computes
with. Weights, optimizer and the teacher's own weights are there before. On a GPU by its allocator, on CPUs by the
resident memory. Run by `run.py`: python tests/bench/gkd.py FOLDER ANSWER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from made_runs import SMALL, recipe, write_run
from measure import MIB, Figure, Peak, answer, peak_memory, sized

from megabatch import Model
from megabatch.config.run import RunConfig
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.loop import open_loop
from megabatch.trainer.signals import StopSignal

VOCAB = sized(151_936, 2048)
CUDA = torch.cuda.is_available()
ROWS, LENGTH = sized((16, 512) if CUDA else (4, 256), (2, 32))
STEPS = sized(4, 2)
TARGET = 1.2


def measured(folder: Path) -> list[Figure]:
    """Largest peaks over steps, after one that warms up."""
    student, teacher = (_model(folder / name, layers=layers) for name, layers in (("student", 2), ("teacher", 4)))
    sft = _peak(_run(folder, student, "sft"))
    figures = []
    for beta in (0.0, 0.5):
        gkd = _peak(_run(folder, student, f"gkd-{beta}", teacher=teacher, beta=beta))
        figures.append(
            Figure(
                name=f"GKD step / SFT step, peak memory, beta={beta:g}",
                value=gkd / sft,
                unit="x",
                target=TARGET,
                note=f"{gkd:.0f} MiB and {sft:.0f} MiB above the start, {ROWS * LENGTH} tokens, {VOCAB:,} entries",
            )
        )
    return figures


def _peak(run: RunConfig) -> float:
    """MiB."""
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        with loop.metrics:
            steps = loop.steps(Progress())
            next(steps)
            peaks = []
            for _ in range(STEPS - 1):
                with _counted() as peak:
                    next(steps)
                peaks.append(peak.mib)
    return max(peaks)


@contextmanager
def _counted() -> Iterator[Peak]:
    if not CUDA:
        with peak_memory() as peak:
            yield peak
        return
    peak, before = Peak(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    peak.mib = (torch.cuda.max_memory_allocated() - before) / MIB


def _model(folder: Path, *, layers: int) -> Path:
    """A random model as transformers saves it, with a tokenizer of bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megabatch.data.tokens.tokenizer import train_bpe

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=1024 if CUDA else 64,
        intermediate_size=4096 if CUDA else 128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64 if CUDA else 16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(layers)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    train_bpe(["some text of words"], vocab_size=300, out_dir=folder)
    return folder


def _run(folder: Path, model: Path, name: str, *, teacher: Path | None = None, beta: float = 0.0) -> RunConfig:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        row = json.dumps({"query": "Say it.", "response": "some text of words " * LENGTH})
        rows.write_text(f"{row}\n" * 64, encoding="utf-8")
    groups: dict[str, dict[str, Any]] = {
        "data": {"dataset": [str(rows)], "max_length": LENGTH, "truncation_strategy": "right", "num_workers": 0},
        "batch": {"micro_batch_size": ROWS, "global_batch_size": ROWS},
        "kernels": {"transformer_impl": "local"},
    }
    if teacher is not None:
        groups |= {"rlhf": {"rlhf_type": "gkd"}, "gkd": {"teacher_model": str(teacher), "beta": beta, "lmbda": 0.0}}
    if CUDA:
        groups |= {"resources": {"gpus_per_node": 1}, "parallel": {"distributed_backend": "nccl"}}
    made = recipe(folder, SMALL, **groups)
    own = Model(model=str(model), torch_dtype="bfloat16" if CUDA else "float32")
    task: Any = "sft" if teacher is None else "rlhf"
    return write_run(replace(made, task=task, model=own), folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(exist_ok=True)
    answer(measured(Path(sys.argv[1])), sys.argv[2])
