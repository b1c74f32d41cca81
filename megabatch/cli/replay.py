"""`megabatch replay`: repeats one update of a GRPO run on one process, and compares it with what the run logged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megabatch.cli.runs import one_run
from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.errors import CheckpointError, ConfigError, LaunchError
from megabatch.insight.curves import final_history
from megabatch.ledger.reader import Reader
from megabatch.run_directory import RunDirectory
from megabatch.saved.history import MCORE, checkpoints, step_of
from megabatch.table import table, terminal_width
from megabatch.values import dataclass

TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 1e-2}
"""Largest relative difference by the run's `torch_dtype`. In float32 only the order of sums differs between a run's
ranks and one process. In 16 bits each rank also rounds its part of a sum before the parts are added: a few units of
the last place, 2^-8 in bfloat16 and 2^-11 in float16, in every layer."""
DECIDE = ("loss", "grad_norm")
"""What must agree; the other numbers are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One number of the update."""

    name: str
    logged: float
    replayed: float
    difference: float
    """Relative to `logged`; the loss's to the size of the terms that it is the sum of, where that is larger."""
    allowed: float | None
    """None: it is shown only."""

    @property
    def passes(self) -> bool:
        """NaN never does."""
        return self.allowed is None or self.difference <= self.allowed


def replay(path: Path, *, step: int, tolerance: float | None, as_json: bool) -> int:
    """Prints the comparison. Exit code 1 if loss or gradient norm differ by more than the tolerance.

    Raises: ConfigError, LaunchError, RewardError, CheckpointError for a step that cannot be replayed.
    """
    folder = one_run(path)
    run = RunConfig.load(RunDirectory(folder).run_json)
    if run.task.name != "grpo":
        raise ConfigError(f"{folder} trained {run.task.name}; only runs of GRPO keep what a step was trained on")
    logged = _require_replayable(folder, step)
    lines = compared(logged, _repeated(folder, step), run, tolerance=tolerance)
    same = all(line.passes for line in lines)
    if as_json:
        print(json.dumps({"step": step, "passes": same, "numbers": [asdict(line) for line in lines]}))
        return int(not same)
    rows = [
        [line.name, f"{line.logged:.9g}", f"{line.replayed:.9g}", f"{line.difference:.1e}", _verdict(line)]
        for line in lines
    ]
    print(table(("", "run", "replay", "difference", ""), rows, width=terminal_width()))
    ranks = run.layout.world_size
    of = f"{ranks} rank{'s' * (ranks > 1)}, {run.recipe.model.torch_dtype}"
    print(f"step {step} of {folder} ({of}): {'the replay agrees' if same else 'THE REPLAY DIFFERS'}")
    return int(not same)


def compared(
    logged: Mapping[str, Any], found: Mapping[str, float | None], run: RunConfig, *, tolerance: float | None
) -> list[Line]:
    """Each number that both have, those that decide first."""
    allowed = tolerance or TOLERANCES[resolved(run.recipe.model.torch_dtype)]
    lines = []
    for name in (*DECIDE, *(name for name in found if name not in DECIDE)):
        before, now = logged.get(name), found.get(name)
        if before is None and now is None:
            continue
        before, now = (math.nan if value is None else float(value) for value in (before, now))
        size = max(abs(before), _size_of_terms(logged, run) if name == "loss" else 0.0, 1e-12)
        decides = allowed if name in DECIDE else None
        lines.append(
            Line(name=name, logged=before, replayed=now, difference=abs(now - before) / size, allowed=decides)
        )
    return lines


def _size_of_terms(logged: Mapping[str, Any], run: RunConfig) -> float:
    """The mean magnitude of a completion's loss. A prompt's advantages cancel, so that their sum may be 0.

    A ratio near 1 leaves |advantage|; dr_grpo divides by the longest completion instead of the completion's own.
    """
    size = float(logged.get("advantage") or 0.0)
    if run.recipe.grpo.loss_type == "dr_grpo":
        size *= float(logged["completion_length"]) / run.recipe.rollout.max_completion_length
    return size


def _require_replayable(folder: Path, step: int) -> Mapping[str, Any]:
    """What the run logged of the step. Raises: LaunchError, RewardError, CheckpointError, with steps that would do."""
    directory = RunDirectory(folder)
    lines = {int(line["step"]): line for line in final_history(directory.metrics)[0]}
    if not lines:
        raise LaunchError(f"{folder} has logged no step yet")
    reader = Reader(directory.ledger)
    saved = {step_of(one) for one in checkpoints(directory) if (one / MCORE).is_dir()}
    known = sorted(lines.keys() & set(reader.steps))
    possible = [one for one in known if one - 1 in saved or one == min(lines)]
    if step in possible:
        return lines[step]
    reader.records(step)
    hint = _nearest(possible, step)
    if step not in lines:
        raise LaunchError(f"step {step} is not in {directory.metrics}; {hint}")
    raise CheckpointError(
        f"step {step} begins with what the run saved after step {step - 1}, and {directory.step(step - 1)} "
        f"{'has no state to resume from' if directory.step(step - 1).is_dir() else 'does not exist'}; {hint}"
    )


def _nearest(possible: Sequence[int], step: int) -> str:
    if not possible:
        return "no step can be replayed: save checkpoints more often (checkpoint.save_interval, save_total_limit)"
    before = [one for one in possible if one < step][-2:]
    after = [one for one in possible if one > step][:2]
    return f"the nearest steps that can be replayed: {', '.join(map(str, before + after))}"


def _repeated(folder: Path, step: int) -> dict[str, float | None]:
    """Raises: LaunchError where the process fails, whose own words are on stderr."""
    program = [sys.executable, "-m", "megabatch.trainer.replay", str(folder), "--step", str(step)]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"step {step} was not replayed: the process ended with exit code {done.returncode}")
    found: dict[str, float | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _verdict(line: Line) -> str:
    if line.allowed is None:
        return ""
    return f"within {line.allowed:.0e}" if line.passes else f"NOT within {line.allowed:.0e}"
