"""The results of a sweep's runs: the finished ones ranked, then the others with their state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.queue import State
from megabatch.slurm.state import status
from megabatch.sweep.folder import SWEEP_JSON, read_sweep
from megabatch.sweep.names import in_order, labels, number_text
from megabatch.table import text_width

Rank = Literal["tokens_per_s", "mfu", "memory_gib", "loss", "eval_loss"]
RANKS: tuple[Rank, ...] = get_args(Rank)
_HIGHEST_FIRST = ("tokens_per_s", "mfu")
_TAIL = 1 << 17
"""Bytes at the end of metrics.jsonl that are read."""
_AVERAGED = 10
"""Number of last steps over which the training loss is averaged."""
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
    tokens_per_s: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation; None for an unknown GPU."""
    memory_gib: float | None = None
    """Peak memory on the first rank."""
    loss: float | None = None
    """Of the last ten training steps, over their tokens."""
    eval_loss: float | None = None


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
    last = train[-1] if train else {}
    return Result(
        name=run.name,
        run=run,
        values=point["values"],
        state=str(now.state),
        why=now.reason or (f"exit code {now.exit_code}" if now.exit_code else ""),
        step=last.get("step"),
        tokens_per_s=last.get("tokens_per_s"),
        mfu=last.get("mfu"),
        memory_gib=last.get("memory_gib"),
        loss=_mean_loss(train[-_AVERAGED:]),
        eval_loss=evals[-1].get("eval_loss") if evals else None,
    )


def _mean_loss(lines: Sequence[Mapping[str, Any]]) -> float | None:
    count = sum(line["loss_count"] for line in lines)
    return sum(line["loss_sum"] for line in lines) / count if count else None


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


def ranked(results: Sequence[Result], *, by: Rank) -> list[Result]:
    """Finished points with the best first, then unfinished, failed, and pruned ones."""

    def key(result: Result) -> tuple[int, bool, float]:
        value = getattr(result, by) if result.state == State.COMPLETED else None
        groups = {State.COMPLETED.value: 0, State.RUNNING.value: 1, State.PENDING.value: 2, PRUNED: 4}
        return groups.get(result.state, 3), value is None, 0 if value is None else _sign(by) * value

    return sorted(results, key=key)


def _sign(by: Rank) -> int:
    return -1 if by in _HIGHEST_FIRST else 1


def results_table(results: Sequence[Result], *, by: Rank) -> str:
    """One line per point, with the ranking column first."""
    swept = in_order({name for result in results for name in result.values})
    label = labels(swept)
    shown = [by, *(name for name in RANKS if name != by)]
    shown = [name for name in shown if name == by or any(getattr(result, name) is not None for result in results)]
    header = [
        "run",
        *(label[name] for name in swept),
        *(name.replace("_per_", "/") for name in shown),
        "step",
        "state",
    ]
    rows = [
        [
            result.name,
            *(_value(result.values.get(name)) for name in swept),
            *(_figure(getattr(result, name)) for name in shown),
            "-" if result.step is None else str(result.step),
            f"{result.state}{f': {result.why}' if result.why else ''}",
        ]
        for result in ranked(results, by=by)
    ]
    widths = [max(text_width(row[i]) for row in [header, *rows]) for i in range(len(header) - 1)]
    return "\n".join(_line(row, widths) for row in [header, *rows])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Aligns the first cell left and the others right; leaves the last one as it is."""
    spaces = [" " * (width - text_width(cell)) for cell, width in zip(row, widths, strict=False)]
    middle = [space + cell for space, cell in zip(spaces[1:], row[1:], strict=False)]
    return "  ".join([row[0] + spaces[0], *middle, row[-1]])


def _value(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_text(value)
    text = "-" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def as_json(results: Sequence[Result], *, by: Rank) -> str:
    """One array, ranked."""
    return json.dumps(
        [{name: _plain(getattr(result, name)) for name in Result.__slots__} for result in ranked(results, by=by)],
        indent=2,
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


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
