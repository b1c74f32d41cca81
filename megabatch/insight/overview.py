"""One line about each of many runs: where it is, how fast, how much longer, and how well it uses its GPUs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megabatch.insight.goodput import Attempt, allocated_s, attempts_of, goodput, remaining_s
from megabatch.insight.tail import last_step
from megabatch.run_directory import RunDirectory
from megabatch.saved.history import SetAside, notes
from megabatch.slurm.bad_nodes import BadNode, read_bad_nodes
from megabatch.slurm.queue import State
from megabatch.slurm.state import RunStatus, status
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """A run's state and progress; unknown values are None."""

    status: RunStatus
    name: str | None
    """The recipe's name for it."""
    step: int | None
    train_iters: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    """Seconds until the last step, across requeues; of runs that wait or run."""
    goodput: float | None
    gpus: int | None
    """The run's GPUs; its ranks if it has no GPUs."""
    allocated_gpu_h: float | None
    """GPU-hours held so far."""
    attempts: int
    bad_nodes: tuple[BadNode, ...]
    """Findings of the preflight of its newest job."""
    damaged: tuple[SetAside, ...] = ()
    """Checkpoints that an attempt found damaged and set aside, while their folders exist."""

    def plain(self) -> dict[str, object]:
        """For JSON: the keys that docs/inspecting.md lists."""
        now = self.status
        return {
            "run": str(now.run),
            "name": self.name,
            "state": now.state.value,
            "source": now.source,
            "reason": now.reason,
            "job_id": now.job_id,
            "attempt": now.attempt,
            "attempts": self.attempts,
            "exit_code": now.exit_code,
            "step": self.step,
            "train_iters": self.train_iters,
            "loss": self.loss,
            "tokens_per_s": self.tokens_per_s,
            "eta_s": self.eta_s,
            "goodput": self.goodput,
            "gpus": self.gpus,
            "allocated_gpu_h": self.allocated_gpu_h,
            "heartbeat_age_s": _number(now.heartbeat_age_s),
            "bad_nodes": [bad.plain() for bad in self.bad_nodes],
            "damaged": [note.describe() for note in self.damaged],
        }


def overview(runs: Sequence[Path]) -> list[Overview]:
    """The overview of each run, in order; each of Slurm's commands is called once for all runs."""
    return [_overview(found) for found in status(runs)]


def run_json(run: Path) -> dict[str, Any]:
    """Content of `run.json`, of any version; empty when it cannot be read."""
    try:
        value = json.loads(RunDirectory(run).run_json.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def history(found: RunStatus) -> list[Attempt]:
    """The run's attempts and how long they held their nodes; for a killed one, until rank 0's last log write."""
    run = RunDirectory(found.run)
    running = found.state is State.RUNNING
    return attempts_of(found.jobs, last_sign=lambda attempt: _changed(run.rank_log(0, attempt)), running=running)


def _overview(found: RunStatus) -> Overview:
    directory, config = RunDirectory(found.run), run_json(found.run)
    step, beat = last_step(directory.metrics), found.heartbeat
    attempts = history(found)
    recipe = config.get("recipe") if isinstance(config.get("recipe"), dict) else {}
    train_iters = _integer(beat.get("train_iters")) or _integer(_group(recipe, "training").get("train_iters"))
    gpus = gpus_of(config)
    allocated = allocated_s(attempts)
    eta_s = None
    if found.state.active and train_iters is not None:
        eta_s = remaining_s(step, train_iters=train_iters, attempts=attempts)
    return Overview(
        status=found,
        name=str(recipe["name"]) if recipe and "name" in recipe else None,
        step=_integer(step.get("step")) if step else _integer(beat.get("step")),
        train_iters=train_iters,
        loss=_number(step.get("loss")),
        tokens_per_s=_number(step.get("tokens_per_s")),
        eta_s=eta_s,
        goodput=goodput(step, attempts),
        gpus=gpus,
        allocated_gpu_h=allocated * gpus / 3600 if attempts and gpus else None,
        attempts=len(attempts),
        bad_nodes=bad_nodes_of(directory, found.job_id),
        damaged=damaged_of(directory),
    )


def damaged_of(run: RunDirectory) -> tuple[SetAside, ...]:
    """The checkpoints that were found damaged and still exist."""
    return tuple(note for note in notes(run) if note.kind == "damaged")


def bad_nodes_of(run: RunDirectory, job_id: str | None) -> tuple[BadNode, ...]:
    """Findings of the preflight in that job."""
    return tuple(bad for bad in read_bad_nodes(run) if bad.job_id == job_id)


def gpus_of(config: Mapping[str, Any]) -> int | None:
    """GPUs of a run according to its `run.json`; its ranks if it has no GPUs."""
    resources = _group(config.get("recipe"), "resources")
    nodes, per_node = _integer(resources.get("nodes")), _integer(resources.get("gpus_per_node"))
    return (nodes or 0) * (per_node or 0) or _integer(_group(config, "layout").get("world_size"))


def _group(values: object, name: str) -> Mapping[str, Any]:
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None
