"""heartbeat.json: shows the launcher, the batch script and people that a run makes progress."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.trainer.ranks import Place

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""Seconds between heartbeats, at least."""


_PACKAGES = ("torch", "megatron-core", "transformer-engine")
"""Packages that affect what a step computes; the launcher's machine may have other versions."""


class Heartbeat:
    """The main rank writes it after progress, never on a timer: if it does not change, the run hangs."""

    def __init__(self, run: RunDirectory, place: Place) -> None:
        self.path, self.attempt, self.is_main = run.heartbeat, place.attempt, place.rank == 0
        self._beat_at = 0.0
        # of an array's element this is `123_4`, as in jobs.jsonl; ranks without Slurm belong to no job
        self._start = {"job_id": os.environ.get("MEGABATCH_JOB_ID"), "attempt": self.attempt, "versions": versions()}

    def beat(self, state: str, *, force: bool = False, **shown: Any) -> None:
        """`starting` (until the first step is done), `running`, `saving`, `stopped`, `failed` or `done`.

        Args: `force`: write even within `INTERVAL_S` of the last one; `shown`: further content of the file.
        """
        now = time.time()
        if not self.is_main or (not force and now - self._beat_at < INTERVAL_S):
            return
        self._beat_at = now
        try:
            write_atomic(self.path, json.dumps({"time": now, "state": state, **self._start, **shown}) + "\n")
        except OSError as e:  # no reason to end a run, still less to hide the one that ended it
            logger.warning("%s cannot be written: %s", self.path, e.strerror or e)


def versions() -> dict[str, str]:
    """Installed versions by package name."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
