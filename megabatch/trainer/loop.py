"""A training run on one rank, from run.json to the last checkpoint."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megabatch.config.recipe import Recipe
from megabatch.config.run import RunConfig
from megabatch.errors import ConfigError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.saved.history import newest_in, step_of
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.checkpoints import torch_dist
from megabatch.trainer.checkpoints.checkpoints import Checkpoints
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.due import best_of, ended_epoch, is_due
from megabatch.trainer.engine import Engine, StepResult
from megabatch.trainer.heartbeat import Heartbeat
from megabatch.trainer.model_source import model_source
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.settings_without_effect import note_settings_without_effect
from megabatch.trainer.signals import StopSignal
from megabatch.trainer.starting import start
from megabatch.trainer.steps import Step
from megabatch.trainer.sums import Flags, Ratio
from megabatch.trainer.tasks.parts import Parts
from megabatch.trainer.tasks.table import opener
from megabatch.trainer.watching.callbacks import Callbacks
from megabatch.trainer.watching.guard import Guard, Seen, remembered, seen_in
from megabatch.trainer.watching.metrics import Metrics, StepRecord
from megabatch.trainer.watching.profiler import Profiler
from megabatch.trainer.watching.tracker import require_installed

logger = logging.getLogger(__name__)


def train(run: RunConfig, stop: StopSignal, activity: Activity) -> ExitCode:
    """Trains until the last step or until asked to stop. Raises: MegabatchError, on every rank."""
    training = run.recipe.training
    if training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    with assemble.join_ranks(run) as ranks:
        note_settings_without_effect(run.recipe, run.shape, is_main=ranks.is_main)
        loop, progress = open_loop(run, ranks, stop, activity)
        with loop.metrics, loop.profiler:
            return loop.run_from(progress)


def open_loop(run: RunConfig, ranks: Ranks, stop: StopSignal, activity: Activity) -> tuple[Loop, Progress]:
    """The run's loop with everything loaded, and the progress it starts from; the caller enters its `metrics`."""
    folder = RunDirectory(Path(run.run_dir))
    heart = Heartbeat(folder, ranks.place)
    if (tracker := run.recipe.logging.report_to) is not None:
        ranks.on_main(lambda: require_installed(tracker))
    source = model_source(run, ranks)
    parts = opener(run)(run, source, ranks, busy=lambda: heart.beat("starting"))
    train_iters = parts.steps.train_iters
    engine = assemble.build_engine(run, ranks, train_iters=train_iters, frozen=parts.frozen, following=parts.following)
    checkpoints = assemble.make_checkpoints(run, ranks, source, parts.export, tuning=engine.model.tuning)
    progress = start(run, engine, checkpoints, source)
    if (
        progress.step >= max(train_iters, 1) and newest_in(folder.checkpoints) is None
    ):  # there would be nothing to save
        raise ConfigError(
            f"the loaded checkpoint is of step {progress.step}, and this run ends at step {train_iters}: no step is "
            "left; train longer, or set checkpoint.finetune=True to begin at step 0 with its weights alone"
        )
    if not checkpoints.has_generators:
        ranks.seed(run.recipe.training.seed, step=progress.step)
    drawn = torch_dist.generators()
    parts.steps.require(progress.cursor)
    logger.info("step %d of %d; %s", progress.step, train_iters, parts.steps.course)
    metrics = Metrics(
        folder,
        run.recipe.logging,
        place=ranks.place,
        shape=run.shape,
        train_iters=train_iters,
        first_step=progress.step,
    )
    loop = Loop(
        recipe=run.recipe,
        engine=engine,
        parts=parts,
        checkpoints=checkpoints,
        guard=Guard(run.recipe.watching, ranks, parts.steps, incidents=folder.incidents),
        callbacks=Callbacks(run.recipe.watching.callbacks, ranks, activity),
        profiler=Profiler(run.recipe.watching, folder, ranks.place),
        metrics=metrics,
        stop=stop,
        activity=activity,
        drawn=drawn,
    )
    return loop, progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """The steps of a run, with evaluations and checkpoints between them; the same for every task."""

    recipe: Recipe
    engine: Engine
    parts: Parts
    checkpoints: Checkpoints
    guard: Guard
    callbacks: Callbacks
    profiler: Profiler
    metrics: Metrics
    stop: StopSignal
    activity: Activity
    drawn: Mapping[str, Any]
    """States of the random generators for the first step, whatever draws before it."""

    @property
    def train_iters(self) -> int:
        return self.parts.steps.train_iters

    def run_from(self, start: Progress) -> ExitCode:
        group = self.recipe.checkpoint
        best = best_of(group, start)
        if start.step == 0 and self.recipe.evaluation.eval_on_start:
            self._evaluate(0)
        if self.recipe.training.manual_gc:
            gc.disable()
        for progress, stop in self.steps(start):
            last = progress.step == self.train_iters
            evaluate = last or is_due(self.recipe.evaluation.eval_interval, progress, group)
            save = last or stop or is_due(group.save_interval, progress, group)
            found = self._evaluate(progress.step) if evaluate else None
            if best is not None and found is not None:
                best.see(progress.step, found)
            if save:
                self._save(
                    progress if best is None else replace(progress, best=best.state),
                    at_once=last or stop,
                    must_resume=stop and not last,
                    with_hf=last or is_due(group.save_safetensors_interval, progress, group),
                )
            self._collect_garbage(progress.step, pause=evaluate or save)
            if stop and not last:
                self.callbacks.call("on_end", progress.step, outcome="stopped")
                self.metrics.heartbeat("stopped", force=True)
                return ExitCode.REQUEUE
        self.callbacks.call("on_end", self.train_iters, outcome="done")
        self.metrics.heartbeat("done", force=True)
        return ExitCode.DONE

    def steps(self, progress: Progress) -> Iterator[tuple[Progress, bool]]:
        """Trains step by step; yields the progress and whether a stop was requested."""
        steps, first = self.parts.steps.after(progress.cursor, self.engine), progress.step
        while progress.step < self.train_iters:
            started = time.perf_counter()
            self.profiler.begin(progress.step + 1)
            self.activity.at("waiting for data", progress.step + 1)
            with self.metrics.timed("data_s"):
                step = next(steps)
            self.activity.at("training", progress.step + 1)
            flags = Flags(stop=self.stop.requested, writing=self.checkpoints.writing)
            before = [Seen(*values) for values in progress.recent]
            if progress.step == first:
                torch_dist.set_generators(self.drawn)
            result = self.engine.step(
                step.packs,
                self.parts.objective,
                totals=step.totals,
                filled=step.filled,
                flags=flags,
                accept=partial(self.guard.accepts, before, number=progress.step + 1, step=step),
                reads=step.take is not None,
            )
            if step.take is not None:
                step.take(result.read)
            seconds = time.perf_counter() - started
            progress = Progress(
                step=progress.step + 1,
                cursor=step.cursor,
                tokens=progress.tokens + step.tokens,
                samples=progress.samples + step.samples,
                loss_scale=result.loss_scale,
                epoch=step.epoch,
                ended_epoch=ended_epoch(progress.epoch, step.epoch),
                seconds=progress.seconds + seconds,
                skipped=progress.skipped + (not result.updated),
                recent=remembered(self.recipe.watching, seen_in(result.metrics, result.grad_norm), before),
            )
            self.engine.follow(progress.step)
            self._log(progress, step, result, seconds=seconds)
            self.profiler.end(progress.step)
            if self.checkpoints.under_way and not result.flags.writing:
                self._finish_save()
            yield progress, result.flags.stop

    def _log(self, progress: Progress, step: Step, result: StepResult, *, seconds: float) -> None:
        extra: dict[str, float] = {}
        if self.recipe.logging.log_params_norm and self.metrics.is_logged(progress.step):
            extra["params_norm"] = self.checkpoints.parameters_norm(self.engine)
        if result.loss_scale is not None:
            extra["loss_scale"] = result.loss_scale["scale"]
        record = StepRecord(
            step=progress.step,
            epoch=step.epoch,
            metrics={**result.metrics, **step.metrics},
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=step.tokens,
            mean_length=step.mean_length,
            samples=step.samples,
            consumed_tokens=progress.tokens,
            consumed_samples=progress.samples,
            seconds=seconds,
            trained_s=progress.seconds,
            skipped=progress.skipped,
            times=result.times,
            extra=extra,
        )
        self.callbacks.call("on_step", progress.step, metrics=dict(self.metrics.log_step(record)))

    def _evaluate(self, step: int) -> Mapping[str, Ratio] | None:
        """Metrics of the validation data; None where the run has none."""
        if self.parts.evaluator is None:
            return None
        self.activity.at("evaluating", step)
        started = time.perf_counter()
        found = self.parts.evaluator.evaluate(self.engine, on_batch=lambda: self.metrics.heartbeat("running"))
        line = self.metrics.log_evaluation(step, found, time.perf_counter() - started)
        self.callbacks.call("on_evaluate", step, metrics=dict(line))
        return found

    def _save(self, progress: Progress, *, at_once: bool, must_resume: bool, with_hf: bool) -> None:
        """Args: at_once: write synchronously, because the run ends with this checkpoint."""
        self.activity.at("saving", progress.step)
        self.metrics.heartbeat("saving", force=True)
        with self.metrics.timed("save_s"):
            self._finish_save()
            if self.recipe.checkpoint.async_save and not at_once:
                self.checkpoints.begin(self.engine, progress, with_hf=with_hf)
                return
            path = self.checkpoints.save(self.engine, progress, must_resume=must_resume, with_hf=with_hf)
        self._saved(path)

    def _finish_save(self) -> None:
        """Waits for the asynchronous checkpoint, if there is one, and commits it."""
        if (path := self.checkpoints.finish()) is not None:
            self._saved(path)

    def _saved(self, path: Path) -> None:
        logger.info("saved %s", path)
        self.callbacks.call("on_save", step_of(path), path=str(path))

    def _collect_garbage(self, step: int, *, pause: bool) -> None:
        """Collects on every rank at the same step, so that no rank waits for another's pause."""
        if not self.recipe.training.manual_gc:
            return
        interval = self.recipe.training.manual_gc_interval
        if (interval and step % interval == 0) or (not interval and pause):
            gc.collect()
