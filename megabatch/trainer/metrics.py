"""Metrics of a run: metrics.jsonl, TensorBoard, the log or a progress bar, and the heartbeat."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from megabatch.config.monitoring import Logging
from megabatch.errors import MegabatchError
from megabatch.plan.flops import peak_tflops, training_flops
from megabatch.plan.shape import ModelShape
from megabatch.run_directory import RunDirectory
from megabatch.trainer.heartbeat import Heartbeat
from megabatch.trainer.ranks import Place
from megabatch.trainer.sums import Ratio

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
    """Such time of all steps that led here, each counted once."""
    extra: Mapping[str, float]


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
        self._last: dict[str, Any] = {}
        self._peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None

    def __enter__(self) -> Metrics:
        if self.is_main:
            from torch.utils.tensorboard import SummaryWriter
            from tqdm import tqdm

            self._file = _appending(self.run.metrics)
            self._board = SummaryWriter(self.settings.tensorboard_dir, max_queue=self.settings.tensorboard_queue_size)
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
            for writer in (self._board, self._file):
                with contextlib.suppress(OSError):  # what a full disk did not take has been said already
                    writer.close()
            if kind is not None:
                self.heartbeat("failed", force=True)

    def log_step(self, record: StepRecord) -> None:
        """One optimizer step: a line of metrics.jsonl always, the rest at its intervals."""
        if not self.is_main:
            return
        self.step = record.step
        self.recent.append((record.seconds, record.tokens))
        values = self._values(record)
        self._write({"kind": "train", **values})
        if record.step % self.settings.tensorboard_log_interval == 0:
            with self._explained(self._board.log_dir):
                self._to_board(values, record)
        if self._bar.disable and self.is_logged(record.step):
            logger.info("%s", self._line(values))
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_s']:.0f} tokens/s", refresh=False)
        self._last = values
        self.heartbeat("running", force=len(self.recent) == 1)

    def is_logged(self, step: int) -> bool:
        """Whether a step has a line in the log: every `log_interval`-th and the last; the same on every rank."""
        return step % self.settings.log_interval == 0 or step == self.train_iters

    def log_evaluation(self, step: int, metrics: Mapping[str, Ratio], seconds: float) -> None:
        """One evaluation of the validation data: every metric under its name with `eval_` before it."""
        if not self.is_main:
            return
        values = _written({f"eval_{name}": ratio for name, ratio in metrics.items()})
        self._write({"kind": "eval", "step": step, **values, "seconds": seconds, "attempt": self.attempt})
        with self._explained(self._board.log_dir):
            for name, ratio in metrics.items():
                if ratio.count:
                    self._board.add_scalar(f"eval/{name}", ratio.value, step)
            if self.settings.log_validation_ppl_to_tensorboard and "loss" in metrics:
                self._board.add_scalar("eval/perplexity", torch.tensor(metrics["loss"].value).exp().item(), step)
        told = ", ".join(f"{name} {ratio.value:.6f}" for name, ratio in metrics.items())
        logger.info("step %d of %d: validation %s", step, self.train_iters, told)

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
            "attempt": self.attempt,
            **record.extra,
        }
        flops = training_flops(self.shape, tokens=record.tokens, mean_length=record.mean_length)
        tflops = flops / record.seconds / self.world_size / 1e12
        if self.settings.log_throughput:
            values["tflops_per_gpu"] = tflops
        if self._peak is not None:
            values["mfu"] = tflops / self._peak
        return values

    def _to_board(self, values: Mapping[str, Any], record: StepRecord) -> None:
        skipped = {"step", "attempt", *(f"{name}_{part}" for name in record.metrics for part in ("sum", "count"))}
        if self.settings.no_log_learning_rate_to_tensorboard:
            skipped.add("learning_rate")
        if not self.settings.log_memory_to_tensorboard:
            skipped.add("memory_gib")
        if not self.settings.log_timers_to_tensorboard:
            skipped |= {"step_s", "trained_s", "tokens_per_s", "eta_s"}
        for name, value in values.items():
            if name not in skipped and value is not None:
                self._board.add_scalar(f"train/{name}", value, record.step)

    def _line(self, values: Mapping[str, Any]) -> str:
        parts = [
            f"step {values['step']} of {self.train_iters}",
            f"loss {values['loss']:.6f}",
            "no update, gradients overflow" if (norm := values["grad_norm"]) is None else f"grad norm {norm:.3f}",
            f"lr {values['learning_rate']:.3e}",
            f"{values['tokens_per_s']:.0f} tokens/s",
            f"{values['step_s']:.2f} s/it",
        ]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        minutes, seconds = divmod(int(values["eta_s"]), 60)
        return ", ".join([*parts, f"{minutes}:{seconds:02d} left"])

    @contextlib.contextmanager
    def _explained(self, place: Path | str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise MegabatchError(f"{place} cannot be written ({e.strerror or e}); free space there") from e

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._explained(self.run.metrics):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def _written(metrics: Mapping[str, Ratio]) -> dict[str, float | None]:
    """Each metric with its numerator and its count; one that nothing counted in has no value."""
    values: dict[str, float | None] = {}
    for name, ratio in metrics.items():
        values |= {
            name: ratio.value if ratio.count else None,
            f"{name}_sum": ratio.total,
            f"{name}_count": ratio.count,
        }
    return values


def _appending(path: Path) -> TextIO:
    """The file, without a last line that a full disk cut short."""
    if path.exists():
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - 2**16))
            end = file.read()
        os.truncate(path, size - len(end) + end.rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")


def _memory_gib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
