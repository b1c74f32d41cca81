"""The model that a policy is compared with: its own base, another adapter of it, or a model of its own."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from megabatch.config.reference import is_second_model, reference_weights
from megabatch.config.run import RunConfig
from megabatch.config.second_layouts import REFERENCE as SECOND
from megabatch.errors import ConfigError
from megabatch.run_directory import RunDirectory
from megabatch.saved.find import find_to_load
from megabatch.trainer.assemble import frozen_model, layout_beside
from megabatch.trainer.checkpoints.checkpoints import Checkpoints
from megabatch.trainer.checkpoints.commit import Retention
from megabatch.trainer.engine import Engine
from megabatch.trainer.model.build import Model
from megabatch.trainer.model_source import ModelSource, model_source
from megabatch.trainer.objectives.objective import REFERENCE
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.references import Following, PolicyWith

logger = logging.getLogger(__name__)


def reference_of(run: RunConfig, source: ModelSource, ranks: Ranks) -> Model | PolicyWith:
    """The reference of a run; collective.

    | tuner_type | ref_model, ref_load | ref_adapters, ref_adapter_load | reference |
    | --- | --- | --- | --- |
    | lora | | | the policy without its adapter |
    | lora | | given | the policy with that adapter in place of its own |
    | full | | | a second model: what the policy begins with (`load`, else `model`) |
    | any | given | | a second model |
    | any | any | given | a second model, unless it is the policy, with that adapter |

    With `sync_ref_model` and LoRA: the policy with a frozen copy of its adapter, which changes nothing at first.

    Raises: ConfigError, ConversionError, CheckpointError on every rank.
    """
    recipe = run.recipe
    if recipe.rlhf.sync_ref_model and recipe.tuner.tuner_type == "lora":
        logger.info("the reference is the policy without its adapter, and then with copies of it")
        return PolicyWith(is_copy=True)
    if not is_second_model(recipe):
        adapter = reference_weights(recipe).adapter
        logger.info("the reference is the policy %s", f"with {adapter}" if adapter else "without its adapter")
        return PolicyWith(None if adapter is None else Path(adapter).expanduser())
    return reference_model(run, source, ranks)


def frozen_of(run: RunConfig, source: ModelSource, ranks: Ranks) -> dict[str, Model | PolicyWith]:
    """What `Parts.frozen` needs for a task with a reference: nothing where its log-probabilities are stored."""
    return {} if run.recipe.rlhf.precompute_ref_log_probs else {REFERENCE: reference_of(run, source, ranks)}


def reference_model(run: RunConfig, source: ModelSource, ranks: Ranks) -> Model:
    """The reference as a second model, which is also what the policy is without its adapter; collective.

    Raises: as `reference_of`.
    """
    own, saved, adapter = reference_weights(run.recipe)
    if own is not None:
        source = _other(own, run, source, ranks)
    logger.info("the reference is a second model: %s", own or saved or run.recipe.model.model or "the new model")
    if SECOND.given(run.recipe):
        run, ranks = layout_beside(run, ranks, SECOND)
    model = frozen_model(run, ranks, source, adapter=None if adapter is None else Path(adapter).expanduser())
    if saved is not None:
        with ranks.in_use():
            _restore(model, run, ranks, source, saved)
    return model


def following(run: RunConfig) -> dict[str, Following]:
    """How the reference follows the policy (`Parts.following`); empty where it does not."""
    group = run.recipe.rlhf
    if not group.sync_ref_model:
        return {}
    return {REFERENCE: Following(every=group.ref_model_sync_steps, alpha=group.ref_model_mixup_alpha)}


def _other(name: str, run: RunConfig, source: ModelSource, ranks: Ranks) -> ModelSource:
    """The weights of a model with the policy's shape. Raises: ConfigError for another shape."""
    recipe = run.recipe
    other = replace(recipe, model=replace(recipe.model, model=name))
    try:
        return model_source(replace(run, recipe=other), ranks, tokenizer=source.tokenizer)
    except ConfigError as e:
        raise ConfigError(f"bridge.ref_model={name!r} must be a model of the policy's shape: {e}") from e


def _restore(model: Model, run: RunConfig, ranks: Ranks, source: ModelSource, path: str) -> None:
    """Loads the weights of a checkpoint in megatron-core's format."""
    found = ranks.on_main(lambda: find_to_load(path, may_be_missing=False))
    assert found is not None, "a checkpoint that must be there is there, or an error"
    checkpoints = Checkpoints(
        RunDirectory(Path(run.run_dir)),
        ranks,
        run.layout,
        retention=Retention(),
        table=source.family.tensors(run.shape),
        export=None,
        each_once=run.recipe.checkpoint.ckpt_fully_parallel_load,
    )
    checkpoints.restore_base(Engine(model, ranks), found.folder)
