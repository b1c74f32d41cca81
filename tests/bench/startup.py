"""From the start of a rank's process to its first step, and what importing costs; and the demo."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from made_runs import EXPERTS, SMALL, recipe, write_run
from measure import (
    ROOT,
    TOY,
    Cost,
    Figure,
    alternated,
    command_cost,
    environment,
    median,
    seconds,
    sized,
    start_trainer,
)

from megabatch import Model, MoE, Recipe

HERE = Path(__file__).parent
TIMES = sized(3, 1)
TIMEOUT_S = 120.0


def startup() -> list[Figure]:
    """A fresh start from a Hugging Face folder and a resume, tokens cached by an earlier run."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        made = recipe(folder, SMALL, experts=EXPERTS, training={"train_iters": 1})
        if not TOY:  # the same is done for `peers`
            made = _of_its_weights(made, folder / "made")
        fresh, resumed, bare = [], [], []
        for number in range(TIMES):
            run_dir = folder / f"run{number}"
            write_run(made, run_dir)
            fresh.append(_first_step(run_dir, lines=1))
            write_run(replace(made, training=replace(made.training, train_iters=2)), run_dir)
            resumed.append(_first_step(run_dir, lines=2))
            bare.append(command_cost([sys.executable, "-W", "ignore", "-c", _BARE, *_weights(made)], cwd=HERE))
    names = sized(("torch", "megatron.core", "megabatch.trainer.loop"), ("megabatch",))
    imports = alternated([[sys.executable, "-W", "ignore", "-c", f"import {name}"] for name in names], times=TIMES)
    return [
        Figure(name="rank start to first step", value=_wall(fresh), unit="s", note="one rank, small experts"),
        Figure(name="resume / fresh start", value=_wall(resumed) / _wall(fresh), unit="x", note="to the first step"),
        Figure(
            name="start to first step / imports and load",
            value=median([ours.cpu_s / theirs.cpu_s for ours, theirs in zip(fresh, bare, strict=True)]),
            unit="x",
            target=1.1,
            note=f"processor time: {_cpu(fresh):.2f} s, torch and megatron-core with the weights {_cpu(bare):.2f} s",
        ),
        *(
            Figure(name=f"import {name}", value=median([c.wall_s for c in costs]), unit="s", note="whole process")
            for name, costs in zip(names, imports, strict=True)
        ),
    ]


_BARE = sized(
    """
import sys
import torch, bare_loop
from safetensors.torch import load_file
for path in sys.argv[1:]:
    load_file(path)
""",
    "import json",
)
"""What a loop on megatron-core imports, and reading the model's files."""


def _weights(made: Recipe) -> list[str]:
    return [] if made.model.model is None else sorted(map(str, Path(made.model.model).glob("*.safetensors")))


def _wall(costs: list[Cost]) -> float:
    return median([cost.wall_s for cost in costs])


def _cpu(costs: list[Cost]) -> float:
    return median([cost.cpu_s for cost in costs])


def _of_its_weights(made: Recipe, run_dir: Path) -> Recipe:
    """The same recipe on the Hugging Face folder that a run of it leaves."""
    write_run(made, run_dir)
    _first_step(run_dir, lines=1)
    hf = run_dir / "checkpoints" / "step_00000001" / "hf"
    return replace(made, model=Model(model=str(hf), torch_dtype="float32"), moe=MoE())


def _first_step(run_dir: Path, *, lines: int) -> Cost:
    """What it takes until metrics.jsonl has this many lines; then waits for the run to end."""
    metrics = run_dir / "metrics.jsonl"
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    place["MEGABATCH_CACHE"] = str(run_dir.with_name("cache"))
    with open(run_dir / "log", "ab") as log:
        started = time.perf_counter()
        words = ["-m", "megabatch.trainer.main", str(run_dir)]
        process = start_trainer(words, environment(**place), output=log.fileno(), errors=log.fileno())
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT_S:
                process.kill()
                raise SystemExit(f"the run in {run_dir} ended early:\n{(run_dir / 'log').read_text()[-2000:]}")
            time.sleep(0.005)
        taken = Cost(time.perf_counter() - started, _processor_s(process.pid))
        if process.wait(TIMEOUT_S):
            raise SystemExit(f"the run in {run_dir} failed:\n{(run_dir / 'log').read_text()[-2000:]}")
    return taken


def _processor_s(pid: int) -> float:
    """User and system time so far (proc(5): fields 14 and 15 of stat, behind the name in parentheses)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def demo() -> list[Figure]:
    """What `make demo` does once everything is installed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), "--local"]
        taken = seconds(lambda: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL))
    return [Figure(name="demo", value=taken, unit="s", target=180, note="after installation")]
