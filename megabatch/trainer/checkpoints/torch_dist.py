"""The state of a run in megatron-core's torch_dist format: model, optimizer and generators, sharded over all ranks."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megabatch.errors import CheckpointError, MegabatchError
from megabatch.saved.manifest import DamagedError, File, Manifest, UnreadableError
from megabatch.trainer.checkpoints import optimizer_state, writing
from megabatch.trainer.checkpoints.reading import Reader, through
from megabatch.trainer.checkpoints.replicas import deal
from megabatch.trainer.checkpoints.trained_state import adapter_state, adapter_tensors, trained_state, trained_tensors
from megabatch.trainer.checkpoints.unpickling import as_data
from megabatch.trainer.engine import Engine
from megabatch.trainer.model.naming import is_of_adapter
from megabatch.trainer.ranks import Ranks

METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""Options for how megatron-core lays out the model's state."""
_TRAINED = "trained"
_FROZEN = "frozen"
logger = logging.getLogger(__name__)


def save(engine: Engine, directory: Path, *, optimizer: bool, rng: bool) -> dict[str, File]:
    """Writes the state of all ranks into an existing empty directory; collective.

    Returns: the files that this rank wrote.
    Raises: CheckpointError on every rank if one could not write.
    """
    planned = plan_save(engine, optimizer=optimizer, rng=rng)
    written, error = writing.Written([], {}), None
    try:
        written = writing.write_items(writing.items(planned), directory, rank=engine.ranks.rank)
    except (OSError, RuntimeError) as e:  # torch wraps a full disk in a RuntimeError
        error = CheckpointError(f"{directory}: {root_cause(e)}")
    engine.ranks.raise_together(error)
    return complete(planned, directory, written, engine.ranks)


def plan_save(engine: Engine, *, optimizer: bool, rng: bool) -> writing.Plan:
    """Plans which parts of the state this rank writes; collective."""
    ranks = engine.ranks
    state: dict[str, Any] = deal(_model_state(engine) | _following_state(engine), ranks)
    if optimizer and engine.optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(engine.optimizer, _optimized_state(engine), ranks)
    if rng:
        state["rng"] = _rng_object(generators(), ranks.rank, ranks.place.world_size)
    return writing.plan(state, content=METADATA)


def complete(planned: writing.Plan, directory: Path, written: writing.Written, ranks: Ranks) -> dict[str, File]:
    """Combines the files that all ranks wrote into one checkpoint; collective.

    Returns: the files that this rank wrote. Raises: CheckpointError on every rank if the main rank could not write.
    """
    error: MegabatchError | None = None
    results = ranks.gather_on_main(written.results)
    files = dict(written.files)
    if results is not None:
        try:
            files |= writing.write_metadata(planned, directory, results)
        except (OSError, RuntimeError) as e:
            error = CheckpointError(f"{directory}: {root_cause(e)}")
    ranks.raise_together(error)
    return files


def load(
    engine: Engine,
    directory: Path,
    manifest: Manifest | None,
    *,
    updates: int | None,
    rng: bool,
    following: bool = False,
    each_once: bool = False,
) -> None:
    """Loads the model and, if requested, optimizer, generators and what follows the policy; collective.

    Args: manifest: digests to check every byte against before using it; None checks nothing.
    updates: number of updates that the checkpoint's optimizer has done, to load it too; None leaves it fresh.
    rng: load the generators, which needs the layout that saved them; everything else loads into any layout.
    following: load the frozen models that follow the policy, where the checkpoint has them; an engine that does not
    train needs them.
    each_once: of the ranks that need the same bytes, one reads them and sends them to the others.
    Raises: CheckpointError on every rank; on a rank that found damage, a DamagedError.
    """
    read = _opened(engine.ranks, directory, manifest, each_once=each_once)
    if following:
        _load_following(engine, read, directory)
    if engine.model.tuning.lora is None:
        _load_own(engine, read)
    else:
        _load_trained(engine, read)
    if engine.optimizer is not None:
        if updates is not None:
            _require_same_optimizer(engine, read, directory)
            in_parts = partial(read, whole=False)
            optimizer_state.restore(
                engine.optimizer, _optimized_state(engine), engine.ranks, in_parts, updates=updates
            )
            engine.optimizer.values_were_restored()
        else:
            engine.optimizer.take_values()
    if rng:
        place = engine.ranks.place
        set_generators(read({"rng": _rng_object(generators(), place.rank, place.world_size)})["rng"])


def _require_same_optimizer(engine: Engine, read: Any, directory: Path) -> None:
    assert engine.optimizer is not None
    saved = read.args[2].read_metadata().state_dict_metadata
    fault = optimizer_state.fault_of_kinds(engine.optimizer, saved)
    engine.ranks.raise_together(None if fault is None else CheckpointError(f"{directory}: {fault}"))


def load_base(engine: Engine, directory: Path, manifest: Manifest | None, *, each_once: bool = False) -> None:
    """Loads the model's own tensors, without any adapters; collective. Raises: CheckpointError, like `load`."""
    _load_own(engine, _opened(engine.ranks, directory, manifest, each_once=each_once))


def _load_own(engine: Engine, read: Any) -> None:
    loaded = read(_own_state(engine))
    for i, chunk in enumerate(chunks := engine.model.chunks):
        missing, unexpected = chunk.load_state_dict(loaded[_chunk_key(i, of=len(chunks))], strict=False)
        absent = [name for name in missing if not is_of_adapter(name)]
        assert not absent and not unexpected, f"{absent}, {unexpected}: megatron-core read other names than asked for"


def _load_trained(engine: Engine, read: Any) -> None:
    loaded = read(_trained_state(engine))[_TRAINED]
    with torch.no_grad():
        for name, parameter in trained_tensors(engine.model, engine.ranks).items():
            parameter.copy_(loaded[name])


def _load_following(engine: Engine, read: Any, directory: Path) -> None:
    saved = read.args[2].read_metadata().state_dict_metadata
    for name in engine.following:
        prefix = _prefix(name)
        if not any(key.startswith(prefix) for key in saved):
            if engine.optimizer is None:
                engine.ranks.raise_together(CheckpointError(f"{directory} has no {name} that follows the policy"))
            logger.warning(
                "%s has no %s that follows the policy: it begins as the run's other settings say", directory, name
            )
            continue
        loaded = read({_FROZEN: _one_following(engine, name)})[_FROZEN]
        model = engine.models[name]
        if model is engine.model:
            with torch.no_grad():
                for key, parameter in adapter_tensors(model, engine.ranks, name).items():
                    parameter.copy_(loaded[key])
            continue
        for i, chunk in enumerate(chunks := model.chunks):
            state = loaded[_chunk_key(i, of=len(chunks))]
            chunk.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()}, strict=False)


def _opened(ranks: Ranks, directory: Path, manifest: Manifest | None, *, each_once: bool) -> Any:
    error: MegabatchError | None = None
    reader: Reader | None = None
    try:
        reader = Reader(directory, manifest)
    except Exception as e:  # unpickling a damaged file can raise anything
        error = _unreadable(directory, e)
    ranks.raise_together(error)
    assert reader is not None
    strategy: LoadShardedStrategy = TorchDistLoadShardedStrategy()
    if each_once:
        strategy = FullyParallelLoadStrategyWrapper(strategy, ranks.replicas)
    return partial(_read, ranks, directory, reader, strategy)


def _read(
    ranks: Ranks,
    directory: Path,
    reader: Reader,
    strategy: LoadShardedStrategy,
    state: dict[str, Any],
    *,
    whole: bool = True,
) -> dict[str, Any]:
    """Args: whole: together the ranks request every part of each tensor; megatron-core then checks that they do."""
    loaded: dict[str, Any] = {}
    error: MegabatchError | None = None
    try:
        with as_data(), through(reader):
            loaded = dist_checkpointing.load(
                state, str(directory), sharded_strategy=strategy, validate_access_integrity=whole
            )
    except CheckpointException as e:  # a BaseException, which 0.16 raises on all ranks when some failed
        failures = [failure for failure, _ in e.failures.values()]
        error = _unreadable(directory, next((f for f in failures if isinstance(f, DamagedError)), failures[0]))
    except Exception as e:  # megatron-core and torch raise many kinds for damaged files
        error = _unreadable(directory, e)
    ranks.raise_together(error)
    return loaded


def _unreadable(directory: Path, error: BaseException) -> MegabatchError:
    if isinstance(error, MegabatchError):
        return error
    if isinstance(error, OSError) and error.errno is not None:  # of a file that megatron-core reads by itself
        return UnreadableError.of(directory, error)
    return CheckpointError(f"{directory}: {root_cause(error)}")


def root_cause(error: BaseException) -> str:
    """The first line of the exception at the root of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Weights only load failed"):  # torch's next lines advise loading it anyway
        return "an object in it is not plain data: loading it could run code"
    return lines[0] if lines else type(error).__name__


def _chunk_key(chunk: int, *, of: int) -> str:
    return "model" if of == 1 else f"model{chunk}"


def _model_state(engine: Engine) -> dict[str, Any]:
    """The model's state in a checkpoint: all of it or, with LoRA, only the trained tensors, since the base is kept
    elsewhere."""
    return _own_state(engine) if engine.model.tuning.lora is None else _trained_state(engine)


def _optimized_state(engine: Engine) -> dict[str, Any]:
    """The layout of the parameters that have optimizer state."""
    return _trained_state(engine) if engine.model.tuning.frozen else _own_state(engine)


def _trained_state(engine: Engine) -> dict[str, Any]:
    return {_TRAINED: trained_state(engine.model, engine.ranks)}


def _own_state(engine: Engine) -> dict[str, Any]:
    chunks = engine.model.chunks
    states = (chunk.sharded_state_dict(metadata=dict(METADATA)) for chunk in chunks)
    return {
        _chunk_key(i, of=len(chunks)): {name: item for name, item in state.items() if not is_of_adapter(name)}
        for i, state in enumerate(states)
    }


def _prefix(name: str) -> str:
    """What the keys of a frozen model begin with."""
    return f"{_FROZEN}.{name}."


def _following_state(engine: Engine) -> dict[str, Any]:
    """The frozen models that follow the policy."""
    found = {name: _one_following(engine, name) for name in engine.following}
    return {_FROZEN: found} if found else {}


def _one_following(engine: Engine, name: str) -> dict[str, Any]:
    model, prefix = engine.models[name], _prefix(name)
    if model is engine.model:
        return dict(adapter_state(model, engine.ranks, name, prefix=prefix))
    chunks = model.chunks
    return {
        _chunk_key(i, of=len(chunks)): chunk.sharded_state_dict(prefix=prefix, metadata=dict(METADATA))
        for i, chunk in enumerate(chunks)
    }


def generators() -> dict[str, Any]:
    """States of this process's random generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def read_generators(ranks: Ranks, directory: Path, manifest: Manifest | None, *, of: int) -> list[dict[str, Any]]:
    """What each of the `of` ranks had that saved a checkpoint; collective. Raises: CheckpointError on every rank."""
    read = _opened(ranks, directory, manifest, each_once=False)
    found = read({str(rank): _rng_object({}, rank, of) for rank in range(of)})
    return [found[str(rank)] for rank in range(of)]


def _rng_object(state: dict[str, Any], rank: int, world_size: int) -> ShardedObject:
    return ShardedObject("rng_state", state, (world_size,), (rank,), replica_id=0)


def set_generators(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))  # which it changes while it draws
