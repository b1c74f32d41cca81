"""A training step with each row over two ranks against one with a row on each, in processor time.

Both have the same rows and ranks, so that what is compared is context parallelism alone: gathering keys, chunks that
see more keys than they have queries, and twice as many passes through the layers. Both take turns in one pair of
processes.
Run by `run.py`: python tests/bench/context.py FOLDER ANSWER, on each of two ranks.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made_runs import SMALL, recipe, write_run
from measure import Figure, answer, median, sized

from megabatch.config.run import RunConfig
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.loop import open_loop
from megabatch.trainer.signals import StopSignal

LENGTH = sized(2048, 64)
STEPS, PAIRS, TARGET = sized(2, 1), sized(7, 1), 1.15
WIDE: dict[str, Any] = {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8,
                        "num_query_groups": 4, "kv_channels": 64, "padded_vocab_size": 4096}  # fmt: skip
"""So that attention over rows of `LENGTH` has about the share of a step that it has in large models at 16K."""


def processor_s(run: RunConfig) -> float:
    """Processor seconds of all ranks in some steps, after one that is not measured."""
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        steps = loop.steps(Progress())
        with loop.metrics:
            next(steps)
            before = time.process_time()
            for _ in range(STEPS):
                next(steps)
            taken = torch.tensor([time.process_time() - before], dtype=torch.float64)
        dist.all_reduce(taken)
        return float(taken)


def made(folder: Path, name: str, context_parallel_size: int) -> RunConfig:
    groups: dict[str, dict[str, Any]] = {
        "data": {"max_length": LENGTH},
        "batch": {"micro_batch_size": 1, "global_batch_size": 2},
        "parallel": {"context_parallel_size": context_parallel_size},
        "resources": {"tasks_per_node": 2},
    }
    folder = folder / f"rank_{os.environ['RANK']}"
    folder.mkdir(exist_ok=True)
    return write_run(recipe(folder, sized(WIDE, SMALL), **groups), folder / name)


def main(folder: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ratios = []
    for number in range(PAIRS):
        pair = [processor_s(made(Path(folder), f"cp{cp}-{number}", cp)) for cp in (1, 2)]
        ratios.append(pair[1] / pair[0])
    note = f"rows of {LENGTH:,} tokens on two ranks; median of {PAIRS} pairs, {min(ratios):.2f} to {max(ratios):.2f}"
    figure = Figure(name="cp 2 / cp 1, processor", value=median(ratios), unit="x", target=TARGET, note=note)
    if dist.get_rank() == 0:
        answer([figure], path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
