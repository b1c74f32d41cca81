"""A training run on one rank, from run.json to the last checkpoint."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megabatch.config.recipe import Recipe
from megabatch.config.run import RunConfig
from megabatch.converters.mapping import Mapped
from megabatch.errors import CheckpointError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.trainer.checkpoint import Checkpoints, Progress, Retention
from megabatch.trainer.data import datasets
from megabatch.trainer.data.batches import Batches, Share, Step
from megabatch.trainer.data.cache import TokenCache
from megabatch.trainer.data.samples import Encoding
from megabatch.trainer.data.schedule import Schedule
from megabatch.trainer.engine import Engine, Ratio
from megabatch.trainer.hf_export import HfExport
from megabatch.trainer.metrics import Metrics, StepRecord
from megabatch.trainer.model.build import build, ddp_config
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.model_source import ModelSource, model_source
from megabatch.trainer.objectives.objective import Objective
from megabatch.trainer.objectives.sft import Sft
from megabatch.trainer.optimizer import Optimizer
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.signals import StopSignal
from megabatch.trainer.weights import parameters_norm

logger = logging.getLogger(__name__)


def train(run: RunConfig, stop: StopSignal) -> ExitCode:
    """Trains until the last step or until asked to stop. Raises: MegabatchError, on every rank."""
    recipe, directory = run.recipe, RunDirectory(Path(run.run_dir))
    if recipe.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    with _ranks(run) as ranks:
        source = model_source(run, ranks)
        data = _data(run, source, ranks)
        train_iters = recipe.training.train_iters or data.schedule.train_iters(recipe.training.max_epochs or 1)
        engine = _engine(run, ranks, train_iters=train_iters)
        checkpoints = _checkpoints(run, directory, ranks, source)
        progress = _start(run, engine, checkpoints, source)
        logger.info(
            "%s: steps %d to %d, %d samples and %d tokens an epoch on %d ranks",
            recipe.name, progress.step, train_iters, len(data.train), int(data.train.lengths.sum()),
            ranks.place.world_size,
        )  # fmt: skip
        metrics = Metrics(
            directory,
            recipe.logging,
            is_main=ranks.is_main,
            world_size=ranks.place.world_size,
            shape=run.shape,
            mean_length=float(np.square(data.train.lengths, dtype=np.float64).sum() / data.train.lengths.sum()),
            train_iters=train_iters,
            first_step=progress.step,
            restart=ranks.place.restart,
        )
        with metrics:
            return _Loop(run, engine, data, checkpoints, metrics, stop, source.family.tensors(run.shape), train_iters).run_from(progress)


@dataclass(frozen=True, slots=True)
class _Data:
    train: TokenCache
    schedule: Schedule
    batches: Batches
    validation: Batches | None


class _Loop:
    """The steps of a run."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        data: _Data,
        checkpoints: Checkpoints,
        metrics: Metrics,
        stop: StopSignal,
        table: Sequence[Mapped],
        train_iters: int,
    ) -> None:
        self.table = table
        self.recipe, self.engine, self.data, self.checkpoints = run.recipe, engine, data, checkpoints
        self.metrics, self.stop, self.train_iters = metrics, stop, train_iters
        self.objective: Objective = Sft(calculate_per_token_loss=bool(run.recipe.training.calculate_per_token_loss))

    def run_from(self, progress: Progress) -> ExitCode:
        if progress.step == 0 and self.recipe.evaluation.eval_on_start:
            self._evaluate(0)
        if self.recipe.training.manual_gc:
            gc.disable()
        for progress, stop in self._steps(progress):
            last = progress.step == self.train_iters
            if last or progress.step % (self.recipe.evaluation.eval_interval or self.train_iters) == 0:
                self._evaluate(progress.step)
            if last or stop or progress.step % self.recipe.checkpoint.save_interval == 0:
                self._save(progress, resumable=stop and not last)
            self._collect_garbage(progress.step)
            if stop and not last:
                self.metrics.heartbeat("stopped", force=True)
                return ExitCode.REQUEUE
        self.metrics.heartbeat("done", force=True)
        return ExitCode.DONE

    def _steps(self, progress: Progress) -> Iterator[tuple[Progress, bool]]:
        """Trains step by step; yields how far the run is and whether a stop was asked for."""
        steps = self.data.batches.train(progress.cursor)
        while progress.step < self.train_iters:
            started = time.perf_counter()
            batch = next(steps)
            result = self.engine.step(
                batch.packs, self.objective, weight=batch.weight, stop=self.stop.requested
            )
            progress = _after(progress, batch)
            self.metrics.log_step(
                StepRecord(
                    step=progress.step,
                    epoch=batch.cursor.epoch + batch.cursor.offset / len(self.data.schedule),
                    loss=result.metrics["loss"],
                    grad_norm=result.grad_norm,
                    learning_rate=result.learning_rate,
                    tokens=batch.tokens,
                    samples=batch.samples,
                    consumed_tokens=progress.tokens,
                    consumed_samples=progress.samples,
                    seconds=time.perf_counter() - started,
                    extra=self._extra(progress.step),
                )
            )
            yield progress, result.stop

    def _extra(self, step: int) -> dict[str, float]:
        due = step % self.recipe.logging.log_interval == 0
        if not (self.recipe.logging.log_params_norm and due):
            return {}
        return {"params_norm": parameters_norm(self.engine.model, self.table, self.engine.ranks)}

    def _evaluate(self, step: int) -> None:
        if self.data.validation is None or self.recipe.evaluation.eval_iters == 0:
            return
        started = time.perf_counter()
        loss = Ratio(0.0, 0.0)
        for batch in self.data.validation.evaluate(eval_iters=self.recipe.evaluation.eval_iters):
            loss += self.engine.evaluate(batch.packs, self.objective)["loss"]
            self.metrics.heartbeat("running")
        self.metrics.log_evaluation(step, loss, time.perf_counter() - started)

    def _save(self, progress: Progress, *, resumable: bool) -> None:
        self.metrics.heartbeat("saving", force=True)
        path = self.checkpoints.save(self.engine, progress, resumable=resumable)
        logger.info("saved %s", path)

    def _collect_garbage(self, step: int) -> None:
        """Every rank at the same step, so that none waits for another's pause."""
        interval = self.recipe.training.manual_gc_interval
        if self.recipe.training.manual_gc and interval and step % interval == 0:
            gc.collect()


def _after(progress: Progress, batch: Step) -> Progress:
    return Progress(
        step=progress.step + 1,
        cursor=batch.cursor,
        tokens=progress.tokens + batch.tokens,
        samples=progress.samples + batch.samples,
    )


def _ranks(run: RunConfig) -> Ranks:
    parallel, layout = run.recipe.parallel, run.layout
    return Ranks(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        seed=run.recipe.training.seed,
    )


def _data(run: RunConfig, source: ModelSource, ranks: Ranks) -> _Data:
    recipe, data = run.recipe, run.recipe.data
    encoding = Encoding(
        tokenizer=source.tokenizer,
        task="pt" if recipe.task == "pt" else "sft",
        template=data.template,
        system=data.system,
        columns=data.columns or {},
        max_length=data.max_length,
        truncation_strategy=data.truncation_strategy or "delete",
        loss_scale=data.loss_scale or "default",
    )
    paths = ranks.on_main(
        lambda: datasets.build(
            encoding,
            dataset=data.dataset,
            val_dataset=data.val_dataset,
            cache_dir=Path(os.environ.get("MEGABATCH_CACHE") or Path(run.run_dir) / "cache"),
            seed=recipe.training.seed,
            dataset_shuffle=data.dataset_shuffle,
            dataset_num_proc=data.dataset_num_proc,
            use_hf=recipe.bridge.use_hf,
        )
    )
    train, validation = datasets.open_caches(
        paths, split_dataset_ratio=data.split_dataset_ratio, seed=recipe.training.seed
    )
    share = _share(run, ranks)
    schedule = _schedule(recipe, train, shuffle=True)
    return _Data(
        train,
        schedule,
        Batches(train, schedule, share=share, num_workers=data.num_workers),
        None
        if validation is None
        else Batches(validation, _schedule(recipe, validation, shuffle=False), share=share, num_workers=1),
    )


def _schedule(recipe: Recipe, data: TokenCache, *, shuffle: bool) -> Schedule:
    return Schedule(
        data.lengths,
        global_batch_size=recipe.batch.global_batch_size,
        seed=recipe.training.seed,
        dataset_shuffle=shuffle and recipe.data.dataset_shuffle,
        train_dataloader_shuffle=shuffle and recipe.data.train_dataloader_shuffle,
        packing_length=recipe.data.packing_length if recipe.data.packing else None,
    )


def _share(run: RunConfig, ranks: Ranks) -> Share:
    return Share(
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        micro_batch_size=run.recipe.batch.micro_batch_size,
        microbatch_multiple=ranks.pp_size if run.layout.vp > 1 else 1,
        row_multiple=ranks.tp_size if run.recipe.parallel.sequence_parallel else 1,
        hidden_size=run.shape.hidden_size,
    )


def _engine(run: RunConfig, ranks: Ranks, *, train_iters: int) -> Engine:
    recipe, parallel = run.recipe, run.recipe.parallel
    config = transformer_config(recipe, run.shape, virtual_size=run.layout.vp if run.layout.vp > 1 else None)
    ddp = ddp_config(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    model = build(run.shape, config, ranks, ddp)
    optimizer = Optimizer(
        model,
        group=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        train_iters=train_iters,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    return Engine(model, ranks, optimizer=optimizer)


def _checkpoints(run: RunConfig, directory: RunDirectory, ranks: Ranks, source: ModelSource) -> Checkpoints:
    group = run.recipe.checkpoint
    table = source.family.tensors(run.shape)
    export = HfExport(source.family, table, source.config_folder, group.max_shard_size)
    return Checkpoints(
        directory,
        ranks,
        run.layout,
        retention=Retention(
            no_save_optim=group.no_save_optim,
            no_save_rng=group.no_save_rng,
            save_retain_interval=group.save_retain_interval,
            save_total_limit=group.save_total_limit,
        ),
        export=export if group.save_safetensors else None,
    )


def _start(run: RunConfig, engine: Engine, checkpoints: Checkpoints, source: ModelSource) -> Progress:
    """This run's own checkpoint, else the one it was told to load, else the model as it came."""
    group = run.recipe.checkpoint
    if own := checkpoints.latest():
        logger.info("resuming from %s", own)
        return checkpoints.restore(engine, own)
    if group.load and (found := _resolve_load(Path(group.load), missing_is_error=group.exit_on_missing_checkpoint)):
        logger.info("loading %s", found)
        weights_only = group.finetune or group.no_load_optim
        rng = not (group.finetune or group.no_load_rng)
        progress = checkpoints.restore(engine, found, optimizer=not weights_only, rng=rng)
        return Progress() if group.finetune else progress
    source.load(engine.model, engine.ranks)
    engine.optimizer_from_model()
    return Progress()


def _resolve_load(path: Path, *, missing_is_error: bool) -> Path | None:
    """A checkpoint folder, or the newest one of a run directory."""
    for candidate in (path, path / "checkpoints"):
        latest = candidate / "latest"
        if latest.is_file():
            return candidate / latest.read_text().strip()
    if (path / "trainer.json").is_file():
        return path
    if missing_is_error:
        raise CheckpointError(f"checkpoint.load={str(path)!r} holds no checkpoint; give a run directory or a step_* folder")
    return None
