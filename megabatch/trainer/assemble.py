"""Puts the parts of a run together: ranks, engine, checkpoints, and the state that it starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megabatch.config.recipe import Recipe
from megabatch.config.run import RunConfig
from megabatch.config.second_layouts import Role, layout_of, parallel_of
from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.targets import MERGES_ONE_OF_TWO, changes_one_of_two
from megabatch.converters.families import family_named
from megabatch.errors import ConfigError
from megabatch.run_directory import RunDirectory
from megabatch.trainer.checkpoints.checkpoints import Checkpoints
from megabatch.trainer.checkpoints.commit import Retention
from megabatch.trainer.engine import Engine
from megabatch.trainer.exports.export import Export
from megabatch.trainer.exports.peft import config_text
from megabatch.trainer.model.build import Model, build, ddp_config
from megabatch.trainer.model.lora.layers import TRAINED
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.model.tuning import ALL, Tuning, tuning_of
from megabatch.trainer.model_source import ModelSource, base_of_adapter
from megabatch.trainer.optimizer import Optimizer
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.references import Following, PolicyWith, add_adapter, with_policy
from megabatch.trainer.stowage import Stowage

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
    """Number of chunks per pipeline stage, in megatron-core's form: None without interleaving."""
    return run.layout.vp if run.layout.vp > 1 else None


def build_engine(
    run: RunConfig,
    ranks: Ranks,
    *,
    train_iters: int,
    frozen: Mapping[str, Model | PolicyWith] | None = None,
    trains: bool = True,
    following: Mapping[str, Following] | None = None,
) -> Engine:
    """The model with uninitialised weights, its optimizer, and the frozen models.

    Args: trains: False for a model without gradients and optimizer, to be evaluated.
    Raises: ConfigError, ConversionError, CheckpointError for a frozen adapter that does not fit the model.
    """
    recipe, parallel = run.recipe, run.recipe.parallel
    config = transformer_config(recipe, run.shape, virtual_size=virtual_size(run))
    ddp = ddp_config(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp32_grads=recipe.optimizer.main_grads_dtype == "fp32",
    )
    family = family_named(run.shape.model_type)
    table = family.tensors(run.shape)
    tuning = tuning_of(recipe.tuner, table)
    grads = ddp if trains else None
    model = build(run.shape, config, ranks, grads, vocab_size=recipe.model.padded_vocab_size, tuning=tuning)
    optimizer = None
    if trains:
        optimizer = Optimizer(
            model,
            group=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            precision=recipe.precision,
            table=table,
            train_iters=train_iters,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        )
    models, adapters = with_policy(frozen or {}, model, ranks, family)
    stowage = None if optimizer is None else _stowage(recipe, model, optimizer, ranks)
    return Engine(
        model, ranks, optimizer=optimizer, frozen=models, adapters=adapters, following=following, stowage=stowage
    )


def _stowage(recipe: Recipe, model: Model, optimizer: Optimizer, ranks: Ranks) -> Stowage | None:
    rollout = recipe.rollout
    if not (rollout.offload_model or rollout.offload_optimizer):
        return None
    return Stowage(
        model,
        optimizer,
        device=ranks.device,
        moves_model=rollout.offload_model,
        moves_optimizer=rollout.offload_optimizer,
    )


def frozen_model(run: RunConfig, ranks: Ranks, source: ModelSource, *, adapter: Path | None = None) -> Model:
    """A model beside the policy, with its weights and without gradients.

    Args: run, ranks: of the policy, or as `layout_beside` gives them; adapter: one that it always has, as in
    `PolicyWith`. Raises: as `build_engine`.
    """
    config = transformer_config(run.recipe, run.shape, virtual_size=virtual_size(run))
    with ranks.in_use():
        model = build(run.shape, config, ranks, None, vocab_size=run.recipe.model.padded_vocab_size)
        source.load(model, ranks)
        if adapter is not None:
            add_adapter(model, ranks, source.family, adapter, name=TRAINED)
    return model


def layout_beside(run: RunConfig, ranks: Ranks, role: Role) -> tuple[RunConfig, Ranks]:
    """The run and its ranks as a model beside the policy sees them; collective where it has a layout of its own.

    Args: run: of that model, with its shape.
    """
    recipe, has_experts = run.recipe, run.shape.num_experts is not None
    parallel = parallel_of(recipe, role, has_experts=has_experts)
    if not role.given(recipe):
        return replace(run, recipe=replace(recipe, parallel=parallel)), ranks
    layout = layout_of(recipe, parallel)
    assert layout is not None, "a rule of the config"
    padded = replace(recipe.model, padded_vocab_size=None)
    own = replace(run, recipe=replace(recipe, parallel=parallel, model=padded), layout=layout)
    logger.info(
        "%s has a layout of its own: tp%d pp%d cp%d ep%d etp%d dp%d",
        role.prefix.rstrip("_"), layout.tp, layout.pp, layout.cp, layout.ep, layout.etp, layout.dp,
    )  # fmt: skip
    return own, ranks.beside(layout)


def make_checkpoints(
    run: RunConfig, ranks: Ranks, source: ModelSource, export: Export, *, tuning: Tuning = ALL
) -> Checkpoints:
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
            by_epochs=group.save_strategy == "epoch",
        ),
        table=source.family.tensors(run.shape),
        export=export if group.save_safetensors else None,
        each_once=group.ckpt_fully_parallel_load,
        adapter_config=None if tuning.lora is None else _adapter_config(run, tuning),
    )


def _adapter_config(run: RunConfig, tuning: Tuning) -> str:
    """Raises: ConversionError, ConfigError, before the first step, if what is saved would be another model."""
    recipe, tables = run.recipe, Tables(family_named(run.shape.model_type), run.shape)
    for_peft = recipe.bridge.merge_lora is False
    if not for_peft and tuning.lora is not None and changes_one_of_two(run.shape, tuning.lora.targets):
        raise ConfigError(f"bridge.merge_lora={recipe.bridge.merge_lora} {MERGES_ONE_OF_TWO}")
    return config_text(recipe.tuner, tuning, tables, base=base_of_adapter(run), for_peft=for_peft).decode()
