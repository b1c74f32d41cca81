"""What a run says of itself: metrics, the log or a progress bar, and the heartbeat."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from megabatch.config.monitoring import Logging
from megabatch.plan.flops import peak_tflops, training_flops
from megabatch.plan.shape import ModelShape
from megabatch.run_directory import RunDirectory
from megabatch.trainer.heartbeat import Heartbeat
from megabatch.trainer.ranks import Place
from megabatch.trainer.sums import Ratio
from megabatch.trainer.watching.sinks import Board, Line, MetricsFile, Sink
from megabatch.trainer.watching.tracker import TrackerProcess

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step, as the loop knows it."""

    step: int
    epoch: float
    metrics: Mapping[str, Ratio]
    """Of the objective and of the source of steps, by name; `loss` is one of them."""
    grad_norm: float | None
    """None where fp16's gradients overflowed, and the step changed no parameter."""
    learning_rate: float
    tokens: int
    """Tokens of the global batch, without padding."""
    mean_length: float
    """Of the sequence that a token is in, on average."""
    samples: int
    consumed_tokens: int
    consumed_samples: int
    seconds: float
    """Wall-clock time of the step, data included."""
    trained_s: float
    """Wall-clock time of all steps so far, each counted once."""
    skipped: int
    """Steps so far whose update was skipped."""
    times: Mapping[str, float]
    """Seconds by part."""
    extra: Mapping[str, float]
    """What else is known of it, by name."""


class Metrics:
    """Writes on the main rank and does nothing on the others; use as a context manager."""

    def __init__(
        self,
        run: RunDirectory,
        settings: Logging,
        *,
        place: Place,
        shape: ModelShape,
        train_iters: int,
        first_step: int,
    ) -> None:
        self.run, self.settings, self.is_main = run, settings, place.rank == 0
        self.world_size, self.shape = place.world_size, shape
        self.train_iters, self.step, self.attempt = train_iters, first_step, place.attempt
        self.recent: deque[tuple[float, int]] = deque(maxlen=50)
        self._heart = Heartbeat(run, place)
        self._sinks: list[Sink] = []
        self._times: dict[str, float] = {}
        self._last: dict[str, Any] = {}
        self._peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None

    def __enter__(self) -> Metrics:
        if self.is_main:
            from tqdm import tqdm

            self._sinks = [MetricsFile(self.run.metrics), Board(self.settings)]
            if (package := self.settings.report_to) is not None:
                self._sinks.append(TrackerProcess(package, self.run, attempt=self.attempt))
            self._bar = tqdm(
                total=self.train_iters, initial=self.step, unit="step", disable=not sys.stderr.isatty(), leave=True
            )
            self.heartbeat("running", force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.is_main:
            self._bar.close()
            for sink in self._sinks:
                sink.close(failed=kind is not None)
            if kind is not None:
                self.heartbeat("failed", force=True)

    def log_step(self, record: StepRecord) -> Line:
        """One optimizer step. Returns: what is known of it; nothing on ranks other than the main one."""
        if not self.is_main:
            return {}
        self.step = record.step
        self.recent.append((record.seconds, record.tokens))
        values = {"kind": "train", **self._values(record)}
        self._times.clear()
        self._write(values)
        if self._bar.disable and self.is_logged(record.step):
            logger.info("%s", self._line(values))
        self._bar.update(1)
        self._bar.set_postfix_str(f"{_loss(values, 4)}, {values['tokens_per_s']:.0f} tokens/s", refresh=False)
        self._last = values
        self.heartbeat("running", force=len(self.recent) == 1)
        return values

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of what is done inside to the next step's line."""
        began = time.perf_counter()
        yield
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - began

    def is_logged(self, step: int) -> bool:
        """Whether a step has a line in the log: every `log_interval`-th and the last; the same on every rank."""
        return step % self.settings.log_interval == 0 or step == self.train_iters

    def log_evaluation(self, step: int, metrics: Mapping[str, Ratio], seconds: float) -> Line:
        """One evaluation of the validation data: every metric under its name with `eval_` before it.

        Returns: as `log_step`.
        """
        if not self.is_main:
            return {}
        values = _written({f"eval_{name}": ratio for name, ratio in metrics.items()})
        line = {"kind": "eval", "step": step, **values, "seconds": seconds, "attempt": self.attempt}
        self._write(line)
        logger.info("step %d of %d: validation %s", step, self.train_iters, told(metrics))
        return line

    def heartbeat(self, state: str, *, force: bool = False) -> None:
        """Tells the launcher that the run is alive; `running` is `starting` until the first step is done."""
        shown = {name: self._last[name] for name in ("loss", "tokens_per_s", "eta_s") if name in self._last}
        known = "starting" if state == "running" and not self.recent else state
        self._heart.beat(known, force=force, step=self.step, train_iters=self.train_iters, **shown)

    def _values(self, record: StepRecord) -> dict[str, Any]:
        seconds = sum(s for s, _ in self.recent)
        rate = sum(t for _, t in self.recent) / seconds
        values: dict[str, Any] = {
            "step": record.step,
            "epoch": round(record.epoch, 6),
            **_written(record.metrics),
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "tokens": record.tokens,
            "samples": record.samples,
            "consumed_tokens": record.consumed_tokens,
            "consumed_samples": record.consumed_samples,
            "step_s": record.seconds,
            "trained_s": record.trained_s,
            "tokens_per_s": rate,
            "eta_s": (self.train_iters - record.step) * seconds / len(self.recent),
            "memory_gib": _memory_gib(),
            "skipped_steps": record.skipped,
            "attempt": self.attempt,
            **(self._times | dict(record.times) if self.settings.log_timers_to_tensorboard else {}),
            **record.extra,
        }
        flops = training_flops(self.shape, tokens=record.tokens, mean_length=record.mean_length)
        tflops = flops / record.seconds / self.world_size / 1e12
        if self.settings.log_throughput:
            values["tflops_per_gpu"] = tflops
        if self._peak is not None:
            values["mfu"] = tflops / self._peak
        return values

    def _write(self, line: Line) -> None:
        for sink in self._sinks:
            sink.write(line)

    def _line(self, values: Mapping[str, Any]) -> str:
        parts = [
            f"step {values['step']} of {self.train_iters}",
            _loss(values, 6),
            "no update, gradients overflow" if (norm := values["grad_norm"]) is None else f"grad norm {norm:.3f}",
            f"lr {values['learning_rate']:.3e}",
            f"{values['tokens_per_s']:.0f} tokens/s",
            f"{values['step_s']:.2f} s/it",
        ]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        minutes, seconds = divmod(int(values["eta_s"]), 60)
        return ", ".join([*parts, f"{minutes}:{seconds:02d} left"])


def _loss(values: Mapping[str, Any], decimals: int) -> str:
    """In words; there is none where nothing of a step was learned."""
    return "nothing to learn" if values["loss"] is None else f"loss {values['loss']:.{decimals}f}"


def _written(metrics: Mapping[str, Ratio]) -> dict[str, float | None]:
    """Each metric with its numerator and count; a metric with count 0 has no value."""
    values: dict[str, float | None] = {}
    for name, ratio in metrics.items():
        values |= {
            name: ratio.value if ratio.count else None,
            f"{name}_sum": ratio.total,
            f"{name}_count": ratio.count,
        }
    return values


def _memory_gib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def told(metrics: Mapping[str, Ratio]) -> str:
    """Metrics as the log tells them; a mean over nothing is not defined."""
    values = {name: f"{ratio.value:.6f}" if ratio.count else "not defined" for name, ratio in metrics.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())
