"""The process that hands a run's metrics to a tracker: `megabatch.trainer.watching.tracking RUN_DIR PATIENCE_S`.

It reads metrics.jsonl, which the trainer writes anyway. So a tracker that fails or waits cannot affect training, and
the next attempt delivers what this one could not. It ends when its input closes, which happens when the trainer ends.
Its own messages go to the rank's log, each once; the package's output goes to a separate log.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import signal
import string
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megabatch.config.run import RunConfig
from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.trainer.watching.completions import Row, tables
from megabatch.trainer.watching.sinks import points
from megabatch.trainer.watching.trackers import TrackedRun, Tracker, open_tracker

logger = logging.getLogger("megabatch.tracker")

INTERVAL_S = 1.0
"""Between looks at metrics.jsonl."""


class Delivery:
    """`tracker.json`: which run of the tracker this is, and how much of metrics.jsonl and of the ledger it has."""

    def __init__(self, run: RunDirectory) -> None:
        self._path, self._metrics, self._ledger = run.tracker, run.metrics, run.ledger
        saved: dict[str, Any] = json.loads(run.tracker.read_text()) if run.tracker.exists() else {}
        alphabet = string.ascii_lowercase + string.digits
        self.id: str = saved.get("id") or "".join(secrets.choice(alphabet) for _ in range(21))
        self._read: int = saved.get("read", 0)
        self._shown: int = saved.get("shown", 0)
        self.note()

    def note(self) -> None:
        write_atomic(self._path, json.dumps({"id": self.id, "read": self._read, "shown": self._shown}) + "\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines that were not delivered yet; each counts as delivered when the next one is asked for."""
        if not self._metrics.exists():
            return
        with open(self._metrics, "rb") as file:
            file.seek(self._read)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                yield json.loads(text)
                self._read += len(text)

    def tables(self, upto: int) -> Iterator[tuple[int, list[Row]]]:
        """Completions of the steps up to this one that were not delivered yet; counted like `lines`."""
        for step, rows in tables(self._ledger, after=self._shown, upto=upto):
            if rows:
                yield step, rows
            self._shown = step


class Clock:
    """Says once when the tracker takes very long over something."""

    def __init__(self, package: str, *, patience_s: float) -> None:
        self._package, self._patience_s = package, patience_s
        self._since: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> None:
        self._since = time.monotonic()

    def end(self) -> None:
        self._since = None

    def _watch(self) -> None:
        while (since := self._since) is None or time.monotonic() - since < self._patience_s:
            time.sleep(INTERVAL_S)
        logger.warning(
            "%s has taken nothing for %.0f s; training goes on without waiting for it", self._package, self._patience_s
        )


def follow(delivery: Delivery, tracker: Tracker, clock: Clock, *, completions: bool = False) -> None:
    """Delivers lines as they are written, until the input is closed, and what is left then.

    Args: completions: whether to show those of each step too.
    """
    closed = False
    while not closed:
        closed = bool(select.select([sys.stdin], [], [], INTERVAL_S)[0])
        newest = 0
        for line in delivery.lines():
            clock.begin()
            tracker.log(line["step"], dict(points(line)))
            newest = max(newest, line["step"])
            clock.end()
        for step, rows in delivery.tables(newest) if completions and newest else ():
            clock.begin()
            tracker.show(step, "completions", rows)
            clock.end()
        delivery.note()
    clock.begin()
    tracker.finish()
    clock.end()


def main(arguments: list[str]) -> int:
    """Exit status: 1 where the tracker failed, which was said.

    Args: a run directory, and after how many seconds a tracker that takes nothing is said to hang.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # those are for the ranks, which close the input when they end
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _words_apart()
    run = RunConfig.load(RunDirectory(Path(arguments[0])).run_json)
    package = run.recipe.logging.report_to
    assert package is not None, "the trainer starts this process for a tracker"
    clock = Clock(package, patience_s=float(arguments[1]))
    try:
        delivery = Delivery(RunDirectory(Path(run.run_dir)))
        clock.begin()
        tracker = open_tracker(package, tracked(run, delivery.id), logger.warning)
        clock.end()
        follow(delivery, tracker, clock, completions=run.recipe.grpo.log_completions)
    except Exception as error:
        logging.getLogger("megabatch.package").exception("%s", package)
        said = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("%s failed (%s); training goes on, and the next attempt delivers the rest", package, said[0])
        return 1
    return 0


def tracked(run: RunConfig, run_id: str) -> TrackedRun:
    """What the tracker is told of a run: its resolved configuration, and where it is."""
    settings, recipe = run.recipe.logging, run.recipe
    folder = Path(settings.wandb_save_dir or Path(run.run_dir) / str(settings.report_to))
    folder.mkdir(parents=True, exist_ok=True)
    return TrackedRun(
        project=settings.wandb_project,
        name=settings.wandb_exp_name or str(recipe.checkpoint.save),
        id=run_id,
        folder=folder,
        config={
            "recipe": asdict(recipe),
            "shape": asdict(run.shape),
            "layout": asdict(run.layout),
            "run_dir": run.run_dir,
        },
    )


def _words_apart() -> None:
    """Our words go to standard output, the rank's log; all that a package prints to standard error, its own."""
    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    handler = logging.StreamHandler(words)
    handler.setFormatter(logging.Formatter("%(asctime)s rank 0 %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    os._exit(status)  # no thread of a package may keep it
