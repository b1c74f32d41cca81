"""The state that a run starts from: its own newest checkpoint, else one that it was told to load, else its model."""

from __future__ import annotations

import logging
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.fit import check_digests, open_fitting
from megabatch.converters.adapters.targets import hf_names
from megabatch.saved.find import FoundCheckpoint, find_to_load
from megabatch.trainer.adapter_sources import FreshAdapters, ReadAdapter
from megabatch.trainer.checkpoints.checkpoints import Checkpoints
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.dispatch_proof import prove_dispatch
from megabatch.trainer.engine import Engine
from megabatch.trainer.made_tensors import MadeTensors
from megabatch.trainer.model.lora.layers import TRAINED
from megabatch.trainer.model.lora.lora import Lora
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.weights import load, prove_complete

logger = logging.getLogger(__name__)


def start(run: RunConfig, engine: Engine, checkpoints: Checkpoints, source: ModelSource) -> Progress:
    """Loads the state that the run starts from; collective. Returns: its progress."""
    progress = _loaded(run, engine, checkpoints, source)
    prove_dispatch(engine.model, engine.ranks)
    return progress


def _loaded(run: RunConfig, engine: Engine, checkpoints: Checkpoints, source: ModelSource) -> Progress:
    prove_complete(engine.model, checkpoints.table, engine.ranks)
    tuning = engine.model.tuning
    if tuning.frozen:
        trained, total = tuning.parameters()
        logger.info("%s of %s parameters are trained (%.3g %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    if (lora := tuning.lora) is None:
        return _start_model(run, engine, checkpoints, source)
    prove_complete(engine.model, lora.table, engine.ranks, adapter=TRAINED)
    return _start_adapters(run, engine, checkpoints, source, lora)


def _start_model(run: RunConfig, engine: Engine, checkpoints: Checkpoints, source: ModelSource) -> Progress:
    if (resumed := checkpoints.resume(engine)) is not None:
        return resumed
    if (found := _found(run.recipe.checkpoint.load, run, engine)) is not None:
        return _from_checkpoint(found.folder, run, engine, checkpoints)
    source.load(engine.model, engine.ranks)
    engine.optimizer_from_model()
    return Progress()


def _start_adapters(
    run: RunConfig, engine: Engine, checkpoints: Checkpoints, source: ModelSource, lora: Lora
) -> Progress:
    """Loads first the base model, which the run's checkpoints do not hold, then the adapters."""
    if (base := _found(run.recipe.checkpoint.load, run, engine)) is not None:
        checkpoints.restore_base(engine, base.folder)
    else:
        source.load(engine.model, engine.ranks)
    if (resumed := checkpoints.resume(engine)) is not None:
        return resumed
    given = run.recipe.tuner.adapter_load
    found = _found(given, run, engine)
    if found is not None and found.of_a_run:
        return _from_checkpoint(found.folder, run, engine, checkpoints)
    folders = [*([] if found is None or given is None else [given]), *run.recipe.bridge.adapters]
    _load_adapters(run, engine, source, lora, Path(folders[0]).expanduser() if folders else None)
    engine.optimizer_from_model()
    return Progress()


def _from_checkpoint(found: Path, run: RunConfig, engine: Engine, checkpoints: Checkpoints) -> Progress:
    group = run.recipe.checkpoint
    if group.finetune:
        checkpoints.restore_weights(engine, found)
        return Progress()
    return checkpoints.restore(engine, found, optimizer=not group.no_load_optim, rng=not group.no_load_rng)


def _load_adapters(run: RunConfig, engine: Engine, source: ModelSource, lora: Lora, folder: Path | None) -> None:
    """Reads adapters from a PEFT or megatron-core folder; without one, initialises new ones."""
    made: MadeTensors
    tuning = engine.model.tuning
    if folder is None:
        made = FreshAdapters(lora.targets, seed=run.recipe.training.seed, start=run.recipe.tuner.init_lora_weights)
    else:
        logger.info("loading the adapter in %s", folder)
        whole = hf_names(tuning.table, tuning.trained)
        tables = Tables(source.family, run.shape)
        fitting = open_fitting(folder, tables, lora.targets, scale=lora.scale, whole=whole)
        engine.ranks.on_main(lambda: check_digests(fitting))
        made = ReadAdapter(fitting)
    load(engine.model, made, lora.table, engine.ranks, dtype_of=made.dtypes, adapter=TRAINED)
    if folder is not None:
        load(engine.model, made, tuning.table, engine.ranks, dtype_of=made.dtypes, only=tuning.trained)


def _found(path: str | None, run: RunConfig, engine: Engine) -> FoundCheckpoint | None:
    """The checkpoint that a recipe names."""
    if path is None:
        return None
    may_be_missing = not run.recipe.checkpoint.exit_on_missing_checkpoint
    found = engine.ranks.on_main(lambda: find_to_load(path, may_be_missing=may_be_missing))
    if found is not None:
        logger.info("loading %s", found.folder)
    return found
