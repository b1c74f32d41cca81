"""A step of GRPO and of DPO beside TRL's trainers, in processor time.

Both sides train the same model in fp32 on one thread from the same Hugging Face folder, on the same prompts or pairs,
in micro-batches of equal size, without recomputation, with a reference model beside. Completions are forced to one
length, so that neither side generates more than the other. Each measures itself after it has warmed up. TRL is this
interpreter's, or that of `BENCH_PEER`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import TOY, Figure, environment, median, sized
from peers import ROWS, hf_model, in_trainer

HERE = Path(__file__).parent
TIMES = sized(3, 1)
PROMPT = 96
"""Most tokens of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    """grpo or dpo."""
    wanted: float
    """Ours at most, of the peer's processor time."""
    batch: dict[str, Any]
    completion: int = 0
    """Tokens of each completion."""
    padding_free: bool = False
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of our side besides those that every case has."""
    steps: tuple[int, int] = (0, 0)
    """Measured, and before them."""


GRPO = Case(
    kind="grpo",
    wanted=0.7,
    batch=sized({"micro_batch_size": 8, "global_batch_size": 64}, {"micro_batch_size": 1, "global_batch_size": 8}),
    completion=sized(96, 6),
    steps=sized((6, 2), (1, 1)),
)
DPO: dict[str, Any] = {
    "kind": "dpo",
    "wanted": 0.8,
    "batch": {"micro_batch_size": 8, "global_batch_size": 16},
    "steps": sized((12, 3), (1, 1)),
}
ALONE = {"rlhf": {"share_prompts": False}}
CASES = {
    "GRPO": GRPO,
    "DPO": Case(**DPO),
    "DPO, padding-free": Case(**DPO, padding_free=True),
    "GRPO, each with its prompt": replace(GRPO, groups=ALONE),
    "DPO, padding-free, each with its prompt": Case(**DPO, padding_free=True, groups=ALONE),
}


def write_pairs(path: Path) -> Path:
    """Sums with a right and a wrong answer, in the columns that both sides read."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(ROWS):
            counts = [rng.randint(2, 99) for _ in range(rng.randint(3, 10))]
            asked = " ".join(f"Box {i} holds {count} apples." for i, count in enumerate(counts, 1))
            right, wrong = (_worked(counts, off) for off in (0, rng.randint(1, 9)))
            row = {"prompt": f"{asked} How many are there?\n", "chosen": right, "rejected": wrong}
            file.write(json.dumps(row) + "\n")
    return path


def _worked(counts: list[int], off: int) -> str:
    total, steps = 0, []
    for count in counts:
        steps.append(f"{total} + {count} = {total + count + off}.")
        total += count + off
    return f"{' '.join(steps)} #### {total}"


def aligned_peers() -> list[Figure]:
    """Only our side where there is no TRL, or at toy size."""
    peer = None if TOY else os.environ.get("BENCH_PEER") or (sys.executable if find_spec("trl") else None)
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        folder = Path(directory)
        write_pairs(folder / "pairs.jsonl")
        hf = hf_model(folder)
        for title, case in list(CASES.items())[: sized(None, 1)]:
            ours, theirs = [], []
            for _ in range(TIMES):
                ours.append(_ours(folder, hf, case))
                if peer:
                    theirs.append(_theirs(peer, folder, hf, case))
            value = median([one["seconds"] for one in ours])
            note = f"processor time; {ours[0]['tokens']:.0f} tokens a step"
            found.append(Figure(name=f"step of {title}", value=1e3 * value, unit="ms", note=note))
            if peer:
                ratios = [one["seconds"] / other["seconds"] for one, other in zip(ours, theirs, strict=True)]
                other = median([one["seconds"] for one in theirs])
                note = f"{1e3 * other:.0f} ms and {theirs[0]['tokens']:.0f} tokens there; {len(ratios)} pairs"
                name = f"step of {title}, ours / TRL"
                found.append(Figure(name=name, value=median(ratios), unit="x", target=case.wanted, note=note))
    return found


def _ours(folder: Path, hf: Path, case: Case) -> dict[str, float]:
    steps, warm_up = case.steps
    groups: dict[str, dict[str, Any]] = {"batch": case.batch}
    groups["rlhf"] = {"rlhf_type": case.kind, **case.groups.get("rlhf", {})}
    if case.kind == "grpo":
        groups["grpo"] = {"num_generations": 8, "reward_funcs": ["repetition"]}
        groups["rollout"] = {"temperature": 1.0, "max_completion_length": case.completion}
    arguments = {
        "folder": str(folder), "hf": str(hf), "rows": str(folder / "pairs.jsonl"), "groups": groups, "steps": steps,
        "warm_up": warm_up,
    }  # fmt: skip
    said = in_trainer([str(HERE / "aligned_loop.py"), json.dumps(arguments)])
    answer: dict[str, float] = json.loads(said.splitlines()[-1])
    return answer


def _theirs(peer: str, folder: Path, hf: Path, case: Case) -> dict[str, float]:
    steps, warm_up = case.steps
    arguments = {
        "kind": case.kind, "rows": str(folder / "pairs.jsonl"), "hf": str(hf), "completion": case.completion,
        "padding_free": case.padding_free, "steps": steps, "warm_up": warm_up, **case.batch,
    }  # fmt: skip
    command = [peer, "-W", "ignore", str(HERE / "trl_aligned_loop.py"), json.dumps(arguments)]
    done = subprocess.run(command, env=environment(), cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer
