"""Prints the trainer's tokens for each second of processor time; run by `peers.py`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from made_runs import SMALL, recipe, write_run

from megabatch import Model
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.loop import open_loop
from megabatch.trainer.signals import StopSignal


def main(folder: str, hf: str, groups: dict[str, dict[str, Any]], steps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    groups["data"] = {"max_length": 1024, **groups["data"]}
    made = recipe(place, SMALL, **groups,
                  recompute={"recompute_granularity": "none"}, kernels={"transformer_impl": "local"},
                  optimizer={"weight_decay": 0.0})  # fmt: skip
    made = replace(made, task="sft", model=Model(model=hf, torch_dtype="float32"))
    run = write_run(made, place / f"ours-{time.time_ns()}")
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        _write_rows(loop.parts.steps.data, place / "rows.jsonl")
        with loop.metrics:
            taken = loop.steps(progress)
            *_, (before, _) = islice(taken, warm_up)
            started = time.process_time()
            *_, (after, _) = islice(taken, steps)
            seconds = time.process_time() - started
        print((after.tokens - before.tokens) / seconds, flush=True)


def _write_rows(samples: Any, path: Path) -> None:
    """The same ids for the peer."""
    with open(path, "w", encoding="utf-8") as file:
        for index in range(len(samples)):
            sample = samples[index]
            mask = [int(weight > 0) for weight in sample.weights]
            file.write(json.dumps({"input_ids": sample.ids.tolist(), "completion_mask": mask}) + "\n")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
