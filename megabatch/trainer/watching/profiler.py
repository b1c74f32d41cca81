"""A trace of some steps with torch's profiler: what ran when, on host and device."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megabatch.config.watching import Watching, profiled
from megabatch.run_directory import RunDirectory
from megabatch.trainer.ranks import Place
from megabatch.trainer.watching.sinks import explained

logger = logging.getLogger(__name__)


class Profiler(AbstractContextManager["Profiler"]):
    """Traces the steps of `profile_steps` on the ranks of `profile_ranks`; does nothing on others."""

    def __init__(self, settings: Watching, run: RunDirectory, place: Place) -> None:
        wanted = settings.profile_steps is not None and place.rank in settings.profile_ranks
        self._steps = profiled(settings.profile_steps) if wanted and settings.profile_steps else range(0)
        self._folder, self._place = run.profile, place
        self._tracing: profile | None = None
        self._span: record_function | None = None
        self._first = 0

    def begin(self, step: int) -> None:
        """Step `step` comes next."""
        if step in self._steps and self._tracing is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._tracing, self._first = profile(activities=activities, record_shapes=True), step
            self._tracing.start()
        if self._tracing is not None:
            self._span = record_function(f"step {step}")
            self._span.__enter__()

    def end(self, step: int) -> None:
        """Step `step` is done. Raises: MegabatchError when the trace cannot be written."""
        if self._tracing is None or self._span is None:
            return
        self._span.__exit__(None, None, None)
        if step + 1 not in self._steps:
            self._write(step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._tracing is not None:  # the run ends amid the steps
            self._tracing.stop()

    def _write(self, last: int) -> None:
        assert self._tracing is not None
        self._tracing.stop()
        name = f"steps_{self._first}-{last}.rank_{self._place.rank}.{self._place.attempt}.json.gz"
        with explained(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._tracing.export_chrome_trace(str(self._folder / name))
        logger.info("traced steps %d to %d: %s", self._first, last, self._folder / name)
        self._tracing = None
