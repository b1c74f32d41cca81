"""From the start of a rank's process to its first step, and what importing costs; and the demo."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from made_runs import EXPERTS, SMALL, recipe, write_run
from measure import ROOT, TOY, Figure, alternated, environment, median, seconds, sized

from megabatch import Model, MoE, Recipe

TIMES = sized(3, 1)
TIMEOUT_S = 120.0


def startup() -> list[Figure]:
    """A fresh start from a Hugging Face folder and a resume, tokens cached by an earlier run."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        made = recipe(folder, SMALL, experts=EXPERTS, training={"train_iters": 1})
        if not TOY:  # the same is done for `peers`
            made = _of_its_weights(made, folder / "made")
        fresh, resumed = [], []
        for number in range(TIMES):
            run_dir = folder / f"run{number}"
            write_run(made, run_dir)
            fresh.append(_first_step_s(run_dir, lines=1))
            write_run(replace(made, training=replace(made.training, train_iters=2)), run_dir)
            resumed.append(_first_step_s(run_dir, lines=2))
    names = sized(("torch", "megatron.core", "megabatch.trainer.loop"), ("megabatch",))
    imports = alternated([[sys.executable, "-W", "ignore", "-c", f"import {name}"] for name in names], times=TIMES)
    return [
        Figure(name="rank start to first step", value=median(fresh), unit="s", note="one rank, small experts"),
        Figure(name="resume / fresh start", value=median(resumed) / median(fresh), unit="x", note="to the first step"),
        *(
            Figure(name=f"import {name}", value=median([c.wall_s for c in costs]), unit="s", note="whole process")
            for name, costs in zip(names, imports, strict=True)
        ),
    ]


def _of_its_weights(made: Recipe, run_dir: Path) -> Recipe:
    """The same recipe on the Hugging Face folder that a run of it leaves."""
    write_run(made, run_dir)
    _first_step_s(run_dir, lines=1)
    hf = run_dir / "checkpoints" / "step_00000001" / "hf"
    return replace(made, model=Model(model=str(hf), torch_dtype="float32"), moe=MoE())


def _first_step_s(run_dir: Path, *, lines: int) -> float:
    """Seconds until metrics.jsonl has this many lines; then waits for the run to end."""
    metrics = run_dir / "metrics.jsonl"
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    place["MEGABATCH_CACHE"] = str(run_dir.with_name("cache"))
    with open(run_dir / "log", "ab") as log:
        started = time.perf_counter()
        command = [sys.executable, "-m", "megabatch.trainer.main", str(run_dir)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**place), stdout=log, stderr=log)
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT_S:
                process.kill()
                raise SystemExit(f"the run in {run_dir} ended early:\n{(run_dir / 'log').read_text()[-2000:]}")
            time.sleep(0.005)
        taken = time.perf_counter() - started
        if process.wait(TIMEOUT_S):
            raise SystemExit(f"the run in {run_dir} failed:\n{(run_dir / 'log').read_text()[-2000:]}")
    return taken


def demo() -> list[Figure]:
    """What `make demo` does once everything is installed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), "--local"]
        taken = seconds(lambda: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL))
    return [Figure(name="demo", value=taken, unit="s", target=180, note="after installation")]
