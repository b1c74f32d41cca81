"""Peak memory of steps: distillation beside supervised fine-tuning, and in-batch negatives from other ranks.

Resident memory above what a rank has once everything is loaded, in processes of their own: the largest of a few steps.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path

from measure import Figure, in_trainer_processes, sized

RANKS = sized(4, 2)
LONG = sized(512, 32)
"""Tokens of each row of distillation."""
VECTORS = sized(32, 2)
"""Rows of each rank's batch of embeddings, with a positive each."""


def memory() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        folder = Path(directory)
        write_rows(folder / "rows.jsonl")
        sft, gkd = (_peak(folder, kind, 1) for kind in (sized("sft", "gkd"), "gkd"))
        alone, together = (_peak(folder, "infonce", ranks) for ranks in (sized(1, RANKS), RANKS))
    return [
        _ratio("GKD / SFT, memory of a step", gkd, sft),
        _ratio(f"InfoNCE over {RANKS} ranks / one, memory", together, alone),
    ]


@functools.cache
def _peak(folder: Path, kind: str, world_size: int) -> Figure:
    (found,) = in_trainer_processes("memory_loop.py", folder, world_size=world_size, words=[kind])
    return found


def _ratio(name: str, one: Figure, other: Figure) -> Figure:
    note = f"{one.value:.0f} MiB and {other.value:.0f} MiB a rank; {one.note}"
    return Figure(name=name, value=one.value / max(other.value, 1.0), unit="x", target=1.2, note=note)


def write_rows(path: Path) -> None:
    """Texts of many words: answers to distil, and pairs that belong together."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(500)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(256):
            query, answer = (" ".join(rng.choices(words, k=LONG)) for _ in range(2))
            row = {"query": query[: LONG // 2], "response": answer, "positive": answer}
            file.write(json.dumps(row) + "\n")
