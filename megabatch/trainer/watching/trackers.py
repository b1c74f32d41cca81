"""wandb and swanlab, as far as a run needs them: open a run, log points, finish. Used in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megabatch.config.monitoring import TRACKER_KEYS

INIT_TIMEOUT_S = 60

Mode = Literal["online", "offline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker knows about a run."""

    project: str
    name: str
    id: str
    """The same in every attempt."""
    folder: Path
    """Of its local files."""
    config: Mapping[str, Any]


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def show(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table; rows have the same columns."""
        ...

    def finish(self) -> None: ...


def open_tracker(package: str, run: TrackedRun, say: Callable[[str], None]) -> Tracker:
    """Online with a key and a server that answers, else offline. Raises: whatever the package raises."""
    make: Any = {"wandb": Wandb, "swanlab": Swanlab}[package]
    key = TRACKER_KEYS[package]
    if not os.environ.get(key):
        say(f"{key} is not set: {package} writes to {run.folder} alone; upload it with `{package} sync`")
        return make(run, "offline")
    try:
        return make(run, "online")
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        say(
            f"{package} cannot be reached ({said[0]}): it writes to {run.folder} alone; "
            f"upload it with `{package} sync`"
        )
        return make(run, "offline")


class Wandb(Tracker):
    """Plots points over the metric `step`, so a run that goes back to a checkpoint can log a step again."""

    def __init__(self, run: TrackedRun, mode: Mode) -> None:
        import wandb

        self._run = wandb.init(
            mode=mode,
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT_S),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def show(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({name: table, "step": step})

    def finish(self) -> None:
        self._run.finish()


class Swanlab(Tracker):
    def __init__(self, run: TrackedRun, mode: Mode) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            mode=mode,
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            log_dir=str(run.folder),
            config=dict(run.config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._swanlab.log(dict(values), step=step)

    def show(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """As texts, one for each row: swanlab's tables are charts."""
        texts = ["\n".join(f"{column}: {value}" for column, value in row.items()) for row in rows]
        self._swanlab.log({name: [self._swanlab.Text(text) for text in texts]}, step=step)

    def finish(self) -> None:
        self._swanlab.finish()
