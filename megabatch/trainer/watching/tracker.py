"""A tracker beside metrics.jsonl and TensorBoard: a process that reads the one and cannot reach the training."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys

from megabatch.config.monitoring import missing_tracker
from megabatch.errors import ConfigError
from megabatch.run_directory import RunDirectory
from megabatch.trainer.watching.sinks import Line, Sink

logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""How long a tracker may accept nothing before we report that it hangs."""
_LAST_S = 30.0
"""Time for a tracker to finish after the last step."""


def require_installed(package: str) -> None:
    """Raises: ConfigError where a tracker is not."""
    if (rule := missing_tracker(package)) is not None:
        raise ConfigError(f"logging.report_to={package!r} {rule}")


class TrackerProcess(Sink):
    """Starts `watching.tracking` and says so once if it ends too early."""

    def __init__(self, package: str, run: RunDirectory, *, attempt: int, patience_s: float = _PATIENCE_S) -> None:
        self._package, self._said = package, False
        self._log = run.logs / f"{package}.{attempt}.log"
        run.logs.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "megabatch.trainer.watching.tracking", str(run.path), str(patience_s)]
        with open(self._log, "ab") as log:
            # a request to stop may reach all processes of a job; this one ends with its input
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
            try:
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def write(self, line: Line) -> None:
        """The process reads the line from metrics.jsonl."""
        if not self._said and self._process.poll() is not None:
            self._say(f"ended with exit code {self._process.returncode}")

    def close(self, *, failed: bool) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if failed:
            return
        try:
            if self._process.wait(_LAST_S) != 0 and not self._said:
                self._say(f"ended with exit code {self._process.returncode}")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._say(f"did not finish within {_LAST_S:.0f} s and was ended")

    def _say(self, what: str) -> None:
        self._said = True
        logger.warning("%s %s; the run does not need it. What it printed: %s", self._package, what, self._log)
