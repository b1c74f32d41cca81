"""The results of a sweep's runs: the finished ones ranked, the others with their state, and means over seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megabatch.config.best_metric import less_is_better
from megabatch.config.checkpoint import Checkpoint
from megabatch.config.run import RunConfig
from megabatch.errors import LaunchError, MegabatchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.queue import State
from megabatch.slurm.state import status
from megabatch.sweep.folder import SWEEP_JSON, read_sweep
from megabatch.values import dataclass

THROUGHPUT = "tokens_per_s"
SHOWN = (THROUGHPUT, "mfu", "memory_gib", "loss", "eval_loss", "reward", "eval_reward")
"""Metrics that the table shows besides the one that it ranks by, where runs log them."""
_TAIL = 1 << 17
"""Bytes at the end of metrics.jsonl that are read."""
_AVERAGED = 10
"""Number of last steps over which metrics of training are averaged."""
PRUNED = "pruned"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One point of a sweep."""

    name: str
    run: Path
    values: Mapping[str, Any]
    """Dotted name → value, of what is swept."""
    state: str
    """The state as in `megabatch status`, or `pruned`."""
    why: str = ""
    """Why it was pruned, or how it failed."""
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name in metrics.jsonl → value: of training, the mean over the last ten steps where a step is a mean itself, else
    that of the last step; `eval_…` of the last evaluation."""


def results_in(folder: Path) -> list[Result]:
    """Every point in `sweep.json`, in its order. Raises: LaunchError for a folder that is not a sweep's."""
    points: dict[str, Any] = read_sweep(folder)["points"]
    runs = [folder / name for name in points]
    return [
        _pruned(run, point) if point["pruned"] and now.state is State.NOT_SUBMITTED else _result(run, point, now)
        for run, point, now in zip(runs, points.values(), status(runs), strict=True)
    ]


def _pruned(run: Path, point: Mapping[str, Any]) -> Result:
    return Result(name=run.name, run=run, values=point["values"], state=PRUNED, why=point["pruned"])


def _result(run: Path, point: Mapping[str, Any], now: Any) -> Result:
    lines = _last_lines(RunDirectory(run).metrics)
    train = [line for line in lines if line.get("kind") == "train"]
    evals = [line for line in lines if line.get("kind") == "eval"]
    return Result(
        name=run.name,
        run=run,
        values=point["values"],
        state=str(now.state),
        why=now.reason or (f"exit code {now.exit_code}" if now.exit_code else ""),
        step=train[-1].get("step") if train else None,
        metrics=_numbers(evals[-1:], "eval_") | _numbers(train[-_AVERAGED:]),
    )


def _numbers(lines: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, float]:
    """The numbers of the last line; of what lines hold as a sum and its count, the mean over all of them."""
    last = lines[-1] if lines else {}
    found = {
        name: value for name, value in last.items() if name.startswith(prefix) and isinstance(value, (int, float))
    }
    for name in [name.removesuffix("_count") for name in found if name.endswith("_count")]:
        count = sum(line.get(f"{name}_count", 0) for line in lines)
        if count:
            found[name] = sum(line.get(f"{name}_sum", 0) for line in lines) / count
        del found[f"{name}_count"]
        found.pop(f"{name}_sum", None)
    return found


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines among the file's last bytes."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            text = file.read()
    except OSError:
        return []
    whole = text.split(b"\n")[1 if size > _TAIL else 0 : -1]
    return [json.loads(line) for line in whole]


def metric_of(folder: Path) -> str:
    """What a sweep is ranked by unless told: its runs' `metric_for_best_model`, else throughput."""
    chosen = _checkpoint_group(folder).metric_for_best_model
    return THROUGHPUT if chosen is None else f"eval_{chosen.removeprefix('eval_')}"


def _checkpoint_group(folder: Path) -> Checkpoint:
    """The settings of the first run that is there; none where none is, or none can be read."""
    for path in sorted(folder.glob("*/run.json")):
        try:
            return RunConfig.load(path).recipe.checkpoint
        except MegabatchError:
            break
    return Checkpoint()


def ranked(results: Sequence[Result], *, by: str) -> list[Result]:
    """Finished points with the best first, then unfinished, failed, and pruned ones.

    Raises: LaunchError for a metric that no run has.
    """
    _require_known(results, by)
    sign = 1 if lowest_first(results, by) else -1

    def key(result: Result) -> tuple[int, bool, float]:
        value = result.metrics.get(by) if result.state == State.COMPLETED else None
        groups = {State.COMPLETED.value: 0, State.RUNNING.value: 1, State.PENDING.value: 2, PRUNED: 4}
        return groups.get(result.state, 3), value is None, 0 if value is None else sign * value

    return sorted(results, key=key)


def lowest_first(results: Sequence[Result], by: str) -> bool:
    """Whether less of a metric is better: as the runs say of their `metric_for_best_model`, else by its name."""
    return less_is_better(by, _checkpoint_group(results[0].run.parent) if results else Checkpoint())


def _require_known(results: Sequence[Result], by: str) -> None:
    known = sorted({name for result in results for name in result.metrics})
    if known and by not in known and by not in SHOWN:
        near = get_close_matches(by, known, n=3)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(known)}"
        raise LaunchError(f"--by {by}: no run of this sweep logs it; {hint}")


def sweeps_folder(path: Path) -> Path:
    """The sweep at a path: the path itself, or the only sweep a few levels beneath it. Raises: LaunchError."""
    patterns = ("", "*/", "*/*/")
    found = [place.parent for pattern in patterns for place in sorted(path.glob(f"{pattern}{SWEEP_JSON}"))]
    if len(found) == 1 or (found and found[0] == path):
        return found[0]
    if not found:
        raise LaunchError(
            f"{path} holds no sweep: there is no {SWEEP_JSON} in it; give the folder that --submit named"
        )
    raise LaunchError(f"{path} holds {len(found)} sweeps; name one: {', '.join(map(str, found[:4]))}")
