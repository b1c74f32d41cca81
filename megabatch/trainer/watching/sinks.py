"""Where metrics go: one line for each step and each evaluation, as `metrics.jsonl` has it, to every sink."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from megabatch.config.monitoring import Logging
from megabatch.errors import MegabatchError

Line = Mapping[str, Any]
"""`kind` (train or eval), `step`, `attempt`, and metrics by name."""

TIMES = frozenset(
    {"step_s", "trained_s", "tokens_per_s", "eta_s", "data_s", "forward_backward_s", "optimizer_s", "save_s"}
)
"""What `log_timers_to_tensorboard` is about."""


_BLOCK_BYTES = 1 << 16


class Sink(Protocol):
    """Used on the main rank alone."""

    def write(self, line: Line) -> None:
        """Writes a line. Raises: MegabatchError if a failure should end the run."""
        ...

    def close(self, *, failed: bool) -> None:
        """Nothing is written after it. Args: failed: the run ends with an error, which nothing should hold up."""
        ...


def points(line: Line) -> Iterator[tuple[str, float]]:
    """The metrics of a line as curves have them: `train/loss`, `eval/loss`; finite numbers, without their counts."""
    kind = line["kind"]
    for name, value in line.items():
        stem, _, part = name.rpartition("_")
        if name in ("kind", "step", "attempt") or (part in ("sum", "count") and stem in line):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            yield f"{kind}/{name.removeprefix('eval_') if kind == 'eval' else name}", value


class MetricsFile(Sink):
    """`metrics.jsonl`: every line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _appending(path)

    def write(self, line: Line) -> None:
        with explained(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self, *, failed: bool) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take has been said already
            self._file.close()


class Board(Sink):
    """TensorBoard: training at its interval, evaluations always, and what the recipe asks for."""

    def __init__(self, settings: Logging) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.settings = settings
        self._board = SummaryWriter(settings.tensorboard_dir, max_queue=settings.tensorboard_queue_size)
        self._left_out: frozenset[str] = frozenset()
        if settings.no_log_learning_rate_to_tensorboard:
            self._left_out |= {"learning_rate"}
        if not settings.log_memory_to_tensorboard:
            self._left_out |= {"memory_gib"}
        if not settings.log_timers_to_tensorboard:
            self._left_out |= TIMES
        if not settings.log_validation_ppl_to_tensorboard:
            self._left_out |= {"eval/perplexity"}

    def write(self, line: Line) -> None:
        step, kind = line["step"], line["kind"]
        if kind == "train" and step % self.settings.tensorboard_log_interval:
            return
        with explained(self._board.log_dir):
            for tag, value in points(line):
                if tag.removeprefix("train/") not in self._left_out:
                    self._board.add_scalar(tag, value, step)

    def close(self, *, failed: bool) -> None:
        with contextlib.suppress(OSError):
            self._board.close()


@contextlib.contextmanager
def explained(place: Path | str) -> Iterator[None]:
    """Errors of the disk as ours. Raises: MegabatchError."""
    try:
        yield
    except OSError as e:
        raise MegabatchError(f"{place} cannot be written ({e.strerror or e}); free space there") from e


def _appending(path: Path) -> TextIO:
    """The file, without a last line that a full disk cut short."""
    if path.exists():
        os.truncate(path, _end_of_lines(path))
    return open(path, "a", encoding="utf-8")


def _end_of_lines(path: Path) -> int:
    """Where the last whole line of a file ends, however long what is behind it is."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _BLOCK_BYTES)
            file.seek(begin)
            if (found := file.read(end - begin).rfind(b"\n")) >= 0:
                return begin + found + 1
            end = begin
    return 0
