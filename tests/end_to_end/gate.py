"""Holds a run still after a step until a test has done to it what it came for: no test races with the training.

The trainer's rank 0 waits right after it has written the step's line of metrics.jsonl, as long as the gate is closed
for this attempt and nobody asked the run to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SITE = """
import importlib.util, os, sys, time

class Gate:
    def find_spec(self, name, path=None, target=None):
        if name != "megabatch.trainer.watching.metrics":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), keep(module.Metrics))
        return spec

def keep(metrics):
    log_step = metrics.log_step
    def held(self, record):
        values = log_step(self, record)
        while closed(record.step):
            time.sleep(0.02)
        return values
    metrics.log_step = held

def closed(step):
    try:
        attempt, last = open(os.environ["TEST_GATE"]).read().split()
    except (OSError, ValueError):
        return False
    asked = os.path.exists(os.environ["MEGABATCH_STOP_REQUEST"])
    return attempt == os.environ["MEGABATCH_ATTEMPT"] and step >= int(last) and not asked

if os.environ.get("RANK") == "0" and "MEGABATCH_ATTEMPT" in os.environ:
    sys.meta_path.insert(0, Gate())
"""


@dataclass(frozen=True)
class Gate:
    """In one run's own folder."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """What the run must be started with."""
        (self.folder / "site").mkdir(exist_ok=True)
        (self.folder / "site" / "sitecustomize.py").write_text(_SITE)
        return {"TEST_GATE": str(self._file), "PYTHONPATH": str(self.folder / "site")}

    def close(self, *, after: int, attempt: int = 0) -> None:
        """That attempt of the run stands still once it has done the step."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{attempt} {after}")
        new.replace(self._file)

    def open(self) -> None:
        self._file.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.folder / "gate"
