"""Supervised fine-tuning beside TRL's SFTTrainer: real tokens for each second of processor time.

Needs another interpreter that imports trl: `BENCH_PEER=/path/to/python python tests/bench/run.py peers`. Both train
the same model in fp32 on one thread from the same Hugging Face folder on the same token ids, in batches of equal size,
without recomputation; neither is asked about before it has warmed up. Padding counts for nobody.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from made_runs import SMALL, recipe, write_run
from measure import Figure, environment, median, sized, start_trainer


@dataclass(frozen=True)
class Case:
    """Fields of `data`, `batch` and `tuner`, and how many times as fast as the peer we want to be."""

    data: dict[str, Any]
    batch: dict[str, Any]
    wanted: float
    tuner: dict[str, Any] = field(default_factory=dict)


TIMES = sized(3, 1)
STEPS, WARM_UP = sized((24, 4), (3, 1))
ROWS = sized(512, 64)
PACKING_LENGTH = 1024
ROWS_OF_8: dict[str, Any] = {"micro_batch_size": 8, "global_batch_size": 16}
PACKS: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": 2}
PACKED: dict[str, Any] = {"packing": True, "packing_length": PACKING_LENGTH}
LORA = {"lora_rank": 8, "lora_alpha": 32}
"""Of all linear layers, without dropout."""
CASES: dict[str, Case] = {
    "unpacked": Case({}, ROWS_OF_8, 2.2),
    "packed, padding-free": Case(PACKED, PACKS, 2.4),
    "LoRA, unpacked": Case({}, ROWS_OF_8, 1.3, LORA),
    "LoRA, packed, padding-free": Case(PACKED, PACKS, 1.3, LORA),
}
PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def write_problems(path: Path) -> Path:
    """Word problems with worked answers, as long as GSM8K's: 50 to 260 tokens."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(ROWS):
            counts = [rng.randint(2, 99) for _ in range(rng.randint(3, 14))]
            asked = " ".join(f"Box {i} holds {count} apples." for i, count in enumerate(counts, 1))
            total, steps = 0, []
            for count in counts:
                steps.append(f"{total} + {count} = {total + count}.")
                total += count
            row = {"query": f"{asked} How many are there?", "response": f"{' '.join(steps)} #### {total}"}
            file.write(json.dumps(row) + "\n")
    return path


def peers() -> list[Figure]:
    """Nothing but a note where no peer is given."""
    peer = os.environ.get("BENCH_PEER")
    if not peer:
        print("peers: set BENCH_PEER to a Python that imports trl (pip install trl, in an environment of its own)")
        return [*_figures(None)]
    subprocess.run([peer, "-c", "import trl"], check=True, capture_output=True)
    return [*_figures(peer)]


def _figures(peer: str | None) -> list[Figure]:
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        folder = Path(directory)
        hf = hf_model(folder)
        for name, case in list(CASES.items())[sized(0, -1) :]:
            ours, theirs = [], []
            for _ in range(TIMES):
                ours.append(_ours(folder, hf, case))
                if peer:
                    theirs.append(_theirs(peer, folder, hf, case))
            found.append(Figure(name=f"SFT, {name}", value=median(ours), unit="t/s", note="tokens a processor second"))
            if peer:
                ratio = median([t / o for o, t in zip(ours, theirs, strict=True)])
                note = f"ours is {1 / ratio:.2f} x as fast; {median(theirs):.0f} tokens a processor second there"
                title = f"SFT, {name}, TRL / ours"
                found.append(Figure(name=title, value=ratio, unit="x", target=1 / case.wanted, note=note))
    return found


def hf_model(folder: Path) -> Path:
    """Random weights, as a run of one step leaves them."""
    write_problems(folder / "train.jsonl")
    made = recipe(folder, SMALL, training={"train_iters": 1}, data={"max_length": PACKING_LENGTH})
    run = write_run(replace(made, task="sft"), folder / "made")
    in_trainer(["-m", "megabatch.trainer.main", run.run_dir])
    return folder / "made" / "checkpoints" / "step_00000001" / "hf"


def _ours(folder: Path, hf: Path, case: Case) -> float:
    tuner = {"tuner_type": "lora", "lora_dropout": 0.0, **case.tuner} if case.tuner else {}
    arguments = {
        "folder": str(folder),
        "hf": str(hf),
        "steps": STEPS,
        "warm_up": WARM_UP,
        "groups": {"data": case.data, "batch": case.batch, "tuner": tuner},
    }
    return float(in_trainer([str(Path(__file__).with_name("sft_loop.py")), json.dumps(arguments)]).splitlines()[-1])


def _theirs(peer: str, folder: Path, hf: Path, case: Case) -> float:
    arguments = {"rows": str(folder / "rows.jsonl"), "hf": str(hf), "steps": STEPS, "warm_up": WARM_UP, **case.batch}
    arguments |= {"packing_length": case.data.get("packing_length"), "lora": case.tuner or None}
    command = [peer, "-W", "ignore", str(Path(__file__).with_name("trl_loop.py")), json.dumps(arguments)]
    done = subprocess.run(command, env=environment(), cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def in_trainer(words: list[str]) -> str:
    """What Python says on stdout, as a rank alone."""
    with tempfile.TemporaryFile("w+") as said:
        status = start_trainer(words, environment(**PLACE), output=said.fileno()).wait()
        said.seek(0)
        if status:
            raise subprocess.CalledProcessError(status, words)
        return said.read()
