"""Saving and loading megatron-core's torch_dist format: model, optimizer and generators, sharded over all ranks."""

from __future__ import annotations

import queue
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megabatch.trainer import optimizer_state
from megabatch.trainer.engine import Engine
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.unpickling import as_data

METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""How megatron-core lays out the model's state."""


class _InProcessWriter(filesystem_async.FileSystemWriterAsync):
    """Writes in this process, as megatron-core from 0.19 on does.

    0.16 starts two processes for every rank even for a synchronous save, and a killed writer leaves the rank waiting
    for ever.
    """

    def get_save_function_and_args(self) -> Any:
        function, preload, arguments = super().get_save_function_and_args()
        if function is None:
            return function, preload, arguments
        transforms = [self.transforms] if hasattr(self, "transforms") else []
        return partial(_write_buckets, transforms), preload, arguments


def _write_buckets(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    written: dict[int, Any] = {}
    for i, bucket in enumerate(buckets):
        outcome: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(i)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, outcome, pending, True)
        _, value = outcome.get()
        if isinstance(value, Exception):
            results.put(value)
            return
        written[i] = value
    results.put(written)


def _use_in_process_writer() -> None:
    """0.16-0.19 also start a manager process, by spawn, to hold the results of writers: seconds for every rank."""
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, lambda mp_mode="spawn": queue.Queue())
    if hasattr(filesystem_async.FileSystemWriterAsync, "write_preloaded_data_multiproc"):
        torch_strategies.FileSystemWriterAsync = _InProcessWriter


def save(engine: Engine, directory: Path, *, optimizer: bool, rng: bool) -> None:
    """Writes the state of all ranks into an existing empty directory; collective. Raises what the writers raised."""
    _use_in_process_writer()
    state = _model_state(engine)
    if optimizer and engine.optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(engine.optimizer, _model_state(engine), engine.ranks)
    if rng:
        state["rng"] = _rng_object(engine.ranks)
    strategy = torch_strategies.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(directory), sharded_strategy=strategy, content_metadata=dict(METADATA))


def load(engine: Engine, directory: Path, *, step: int | None, rng: bool) -> None:
    """Reads the model and, if asked for, optimizer and generators into the engine; collective.

    Args: step: optimizer steps done by the checkpoint, to load the optimizer too; None leaves it fresh.
    rng: needs the layout that the checkpoint was saved with; everything else loads into any layout.
    """
    read = partial(_read, directory)
    loaded = read(_model_state(engine))
    for i, chunk in enumerate(chunks := engine.model.chunks):
        chunk.load_state_dict(loaded[_chunk_key(i, of=len(chunks))], strict=True)
    if engine.optimizer is not None:
        if step is not None:
            optimizer_state.restore(engine.optimizer, _model_state(engine), engine.ranks, read, step=step)
        else:
            engine.optimizer.megatron.reload_model_params()
    if rng:
        _set_rng(read({"rng": _rng_object(engine.ranks)})["rng"])


def _read(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    strategy = get_default_load_sharded_strategy(str(directory))
    with as_data():
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory), sharded_strategy=strategy)
    return loaded


def _chunk_key(chunk: int, *, of: int) -> str:
    return "model" if of == 1 else f"model{chunk}"


def _model_state(engine: Engine) -> dict[str, Any]:
    chunks = engine.model.chunks
    return {
        _chunk_key(i, of=len(chunks)): chunk.sharded_state_dict(metadata=dict(METADATA))
        for i, chunk in enumerate(chunks)
    }


def _rng_object(ranks: Ranks) -> ShardedObject:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    world = ranks.place.world_size
    return ShardedObject("rng_state", state, (world,), (ranks.rank,), replica_id=0)


def _set_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
