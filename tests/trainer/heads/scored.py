"""Tasks that score texts as compositions of parallel sizes, rows and tuning, for `composed.Composed`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compositions import EXPERTS, GLOBAL_BATCH_SIZE, LORA, WIDTHS, Composition, laid_out
from runs import recipe_on, with_fields

from megabatch import Recipe

ROWS = 160
LEARNS: dict[str, Any] = {"lr": 2e-3, "min_lr": 2e-3}
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "seq_cls": {"training": {"num_labels": 3}},
    "embedding": {"embedding": {"infonce_temperature": 0.5}},
    "reranker": {"reranker": {"loss_type": "listwise_reranker"}},
    "generative_reranker": {
        "reranker": {"generative_reranker_positive_token": "y", "generative_reranker_negative_token": "Ċ"},
        "data": {"system": "Judge."},
    },
}
COMPOSITIONS = (
    Composition(experts=False, packed=False, lora=False, tp=2, sp=True),
    Composition(experts=False, packed=True, lora=False, pp=2, vp=2),
    Composition(experts=False, packed=True, lora=True, cp=2),
    Composition(experts=True, packed=False, lora=False, dp=2, ep=2),
    Composition(experts=False, packed=True, lora=True, dp=2),
)
"""Each parallel size, with rows packed or not, and adapters or none; all of them add up micro-batches."""


def write_rows(task: str, folder: Path) -> None:
    draw = random.Random(0)
    for name, count in (("train", ROWS), ("validation", 8)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(count):
                a, b, other = (draw.randint(0, 99) for _ in range(3))
                row = {"query": f"{a} + {b}", "positive": str(a + b), "negatives": [str(other)]}
                labelled = {"text": f"{a} + {b} = {other}", "label": other % 3}
                file.write(json.dumps(labelled if task == "seq_cls" else row) + "\n")


def recipe_of(task: str) -> Callable[[Composition, Path], Recipe]:
    """Recipes of a task, by composition and the folder with its rows."""

    def made(one: Composition, folder: Path) -> Recipe:
        length = 384 if "reranker" in task else 64
        own, packed = TASKS[task], {"packing": True, "packing_length": length} if one.packed else {}
        base = recipe_on(
            folder,
            "qwen3_moe" if one.experts else "qwen3",
            moe=EXPERTS if one.experts else {},
            tuner=LORA if one.lora else {},
            batch={"global_batch_size": GLOBAL_BATCH_SIZE},
            evaluation={"eval_on_start": False},
            learning_rate=LEARNS,
        )
        base = with_fields(base, model={**WIDTHS, "num_layers": one.num_layers})
        for groups in ({"data": {"max_length": length // 2, **packed}}, own):
            base = with_fields(base, **groups)
        return laid_out(with_fields(base, training={"task_type": task}), one)

    return made
