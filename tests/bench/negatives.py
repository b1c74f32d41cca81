"""Peak memory of a rank's step of InfoNCE: with in-batch negatives from several ranks, against one rank alone.

Resident memory above what a rank has once everything is loaded, in processes of their own: the largest of a few steps.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

from measure import Figure, answer, in_trainer_processes, peak_memory, sized

RANKS = sized(4, 2)
VECTORS = sized(32, 2)
"""Rows of each rank's batch of embeddings, with a positive each."""
WORDS = sized(512, 32)
STEPS = 2


def negatives() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        folder = Path(directory)
        write_rows(folder / "rows.jsonl")
        alone, together = (_peak(folder, ranks) for ranks in (sized(1, RANKS), RANKS))
    note = f"{together.value:.0f} MiB and {alone.value:.0f} MiB a rank; {VECTORS} pairs a rank"
    ratio = together.value / max(alone.value, 1.0)
    return [Figure(name=f"InfoNCE over {RANKS} ranks / one, memory", value=ratio, unit="x", target=1.2, note=note)]


def _peak(folder: Path, world_size: int) -> Figure:
    (found,) = in_trainer_processes("negatives.py", folder, world_size=world_size)
    return found


def write_rows(path: Path) -> None:
    """Pairs of texts that belong together."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(500)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(256):
            query, answer = (" ".join(rng.choices(words, k=WORDS)) for _ in range(2))
            file.write(json.dumps({"query": query[: WORDS // 2], "positive": answer}) + "\n")


def main(folder: str, path: str) -> None:
    """One rank's part."""
    import torch
    from made_runs import SMALL, recipe, write_run

    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.signals import StopSignal

    torch.set_num_threads(1)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    made = recipe(
        Path(folder),
        SMALL,
        data={"dataset": [str(Path(folder) / "rows.jsonl")], "num_workers": 0, "max_length": 64},
        batch={"micro_batch_size": VECTORS, "global_batch_size": VECTORS * world},
        training={"task_type": "embedding"},
        recompute={"recompute_granularity": "none"},
        kernels={"transformer_impl": "local"},
        resources={"tasks_per_node": world},
    )
    run = write_run(replace(made, task="sft"), Path(folder) / f"{world}-{rank}")
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        with loop.metrics, peak_memory() as peak:
            for _ in islice(loop.steps(progress), STEPS):
                pass
    if rank == 0:
        answer([Figure(name="rank", value=peak.mib, unit="MiB")], path)


if __name__ == "__main__":
    main(*sys.argv[1:])
