"""Puts the parts of a run together: ranks, engine, checkpoints, and the state that it starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.run_directory import RunDirectory
from megabatch.saved.find import find_to_load
from megabatch.trainer.checkpoints.checkpoints import Checkpoints
from megabatch.trainer.checkpoints.commit import Retention
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.engine import Engine
from megabatch.trainer.exports.export import Export
from megabatch.trainer.model.build import Model, build, ddp_config
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.optimizer import Optimizer
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import prove_complete

logger = logging.getLogger(__name__)


def join_ranks(run: RunConfig) -> Ranks:
    layout = run.layout
    return Ranks(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual_size(run),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=run.recipe.parallel.distributed_timeout_minutes,
        seed=run.recipe.training.seed,
        gpus_per_node=run.recipe.resources.gpus_per_node,
    )


def virtual_size(run: RunConfig) -> int | None:
    """Chunks of each pipeline stage as megatron-core wants it: None without interleaving."""
    return run.layout.vp if run.layout.vp > 1 else None


def build_engine(
    run: RunConfig, ranks: Ranks, *, train_iters: int, frozen: Mapping[str, Model] | None = None
) -> Engine:
    """The model with uninitialised weights, its optimizer, and the models that stay as they are."""
    recipe, parallel = run.recipe, run.recipe.parallel
    config = transformer_config(recipe, run.shape, virtual_size=virtual_size(run))
    ddp = ddp_config(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    model = build(run.shape, config, ranks, ddp, vocab_size=recipe.model.padded_vocab_size)
    optimizer = Optimizer(
        model,
        group=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        train_iters=train_iters,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    return Engine(model, ranks, optimizer=optimizer, frozen=frozen)


def make_checkpoints(run: RunConfig, ranks: Ranks, source: ModelSource, export: Export) -> Checkpoints:
    group = run.recipe.checkpoint
    return Checkpoints(
        RunDirectory(Path(run.run_dir)),
        ranks,
        run.layout,
        retention=Retention(
            no_save_optim=group.no_save_optim,
            no_save_rng=group.no_save_rng,
            save_retain_interval=group.save_retain_interval,
            save_total_limit=group.save_total_limit,
        ),
        table=source.family.tensors(run.shape),
        export=export if group.save_safetensors else None,
    )


def start(run: RunConfig, engine: Engine, checkpoints: Checkpoints, source: ModelSource) -> Progress:
    """Loads this run's own newest checkpoint, else the one it was told to load, else the model as it came; collective.

    Returns: where the run goes on.
    """
    prove_complete(engine.model, checkpoints.table, engine.ranks)
    group = run.recipe.checkpoint
    if (resumed := checkpoints.resume(engine)) is not None:
        return resumed
    if load := group.load:
        may_be_missing = not group.exit_on_missing_checkpoint
        found = engine.ranks.on_main(lambda: find_to_load(load, may_be_missing=may_be_missing))
        if found is not None:
            folder = found.folder
            logger.info("loading %s", folder)
            if group.finetune:
                checkpoints.restore_weights(engine, folder)
                return Progress()
            return checkpoints.restore(engine, folder, optimizer=not group.no_load_optim, rng=not group.no_load_rng)
    source.load(engine.model, engine.ranks)
    engine.optimizer_from_model()
    return Progress()
