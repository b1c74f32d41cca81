"""Prints the trainer's processor seconds and tokens of a step of GRPO or DPO; run by `aligned_peers.py`."""

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
from megabatch.trainer.rl import prompts
from megabatch.trainer.signals import StopSignal


def main(folder: str, hf: str, rows: str, groups: dict[str, dict[str, Any]], steps: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    prompts._stop_ids = lambda *_: ()  # type: ignore[assignment]  # completions end at their full length
    place = Path(folder)
    data = {"dataset": [rows], "max_length": 512, "template": "plain", "truncation_strategy": "delete"}
    made = recipe(place, SMALL, data=data, recompute={"recompute_granularity": "none"},
                  kernels={"transformer_impl": "local"}, optimizer={"weight_decay": 0.0}, **groups)  # fmt: skip
    made = replace(made, task="rlhf", model=Model(model=hf, torch_dtype="float32"))
    run = write_run(made, place / f"ours-{time.time_ns()}")
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        with loop.metrics:
            taken = loop.steps(progress)
            *_, (before, _) = islice(taken, warm_up)
            started = time.process_time()
            *_, (after, _) = islice(taken, steps)
            seconds = time.process_time() - started
    print(json.dumps({"seconds": seconds / steps, "tokens": (after.tokens - before.tokens) / steps}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
