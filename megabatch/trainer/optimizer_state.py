"""Optimizer state by parameter: what a checkpoint holds, whatever the layout that wrote it.

megatron-core's own layouts do not survive every model. In 0.16.1 `fully_reshardable` drops the tail of a buffer with
more than one bucket (it says "can lead to data corruption"), `dp_reshardable` refuses parameters that are no
multiple of 64, and `fully_sharded_model_space` needs flattened ranges that were removed. Here a parameter's state is
put together over its data-parallel group, one parameter at a time, on the rank that will write it. Parameters are
dealt round-robin, so that memory and writing are spread evenly. The keys are those of megatron-core's
`fully_reshardable`: `optimizer.state.{param,exp_avg,exp_avg_sq}.<parameter>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megabatch.trainer.optimizer import Optimizer
from megabatch.trainer.ranks import Ranks

BLOCK_BYTES = 2 << 30
"""State read from a checkpoint at once, on each rank."""


@dataclass(frozen=True, slots=True)
class _State:
    """One parameter's optimizer state on this rank: a range of the flat parameter."""

    parameter: nn.Parameter
    start: int
    stop: int
    is_split: bool
    """Whether the ranks of the data-parallel group hold different ranges; the same on all of them."""
    tensors: Mapping[str, Tensor]
    """Flat views by name: `param` (fp32 main copy) and the optimizer's own."""


def sharded(optimizer: Optimizer, model_state: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What this rank writes, as megatron-core's sharded tensors; collective over each data-parallel group."""
    described = _described(model_state)
    names = optimizer.state_names
    found: dict[str, Any] = {}
    for i, (state, group) in enumerate(_states(optimizer, ranks)):
        metadata = described[state.parameter]
        writer = i % dist.get_world_size(group)
        is_writer = dist.get_rank(group) == writer
        for name in names:
            whole = _whole(state, name, group, writer)
            if is_writer:
                found[f"{i}.{name}"] = _entry(metadata, name, whole, replica=0)
    return found


def restore(optimizer: Optimizer, model_state: Mapping[str, Any], ranks: Ranks, load: Any, *, step: int) -> None:
    """Fills this rank's ranges from a checkpoint, some parameters at a time.

    Args: load: takes a dict of sharded tensors and returns it with their values; step: optimizer steps done.
    """
    optimizer.allocate_state(step)
    described = _described(model_state)
    names = optimizer.state_names
    for block in _blocks(_states(optimizer, ranks)):
        wanted = {
            f"{i}.{name}": _entry(
                described[state.parameter],
                name,
                torch.empty(state.parameter.shape, dtype=torch.float32),
                replica=dist.get_rank(group),
            )
            for i, (state, group) in enumerate(block)
            for name in names
        }
        loaded = load(wanted)
        with torch.no_grad():
            for i, (state, _) in enumerate(block):
                for name in names:
                    if state.stop > state.start:
                        state.tensors[name].copy_(loaded[f"{i}.{name}"].reshape(-1)[state.start : state.stop])


def _described(model_state: Mapping[str, Any]) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    """How each parameter lies in its global tensor."""
    return {
        item.data: item
        for item in nested_values(dict(model_state))
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and isinstance(item.data, nn.Parameter)
    }


def _entry(
    metadata: ShardedTensor | ShardedTensorFactory, name: str, data: Tensor, *, replica: int
) -> ShardedTensor | ShardedTensorFactory:
    *outer, _ = metadata.replica_id
    values: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{metadata.key}",
        "data": data,
        "replica_id": (*outer, replica),
    }
    if isinstance(metadata, ShardedTensor):
        values["dtype"] = data.dtype
    return replace(metadata, **values)


def _whole(state: _State, name: str, group: dist.ProcessGroup, writer: int) -> Tensor | None:
    """The parameter's state in the parameter's shape on the writing rank, None elsewhere."""
    parts = dist.get_world_size(group)
    if not state.is_split or parts == 1:
        return state.tensors[name].view(state.parameter.shape).cpu() if dist.get_rank(group) == writer else None
    whole = torch.zeros(state.parameter.numel(), dtype=torch.float32, device=state.parameter.device)
    if state.stop > state.start:
        whole[state.start : state.stop] = state.tensors[name]
    dist.reduce(whole, group=group, group_dst=writer)
    if dist.get_rank(group) != writer:
        return None
    return whole.view(state.parameter.shape).cpu()


def _states(optimizer: Optimizer, ranks: Ranks) -> Iterator[tuple[_State, dist.ProcessGroup]]:
    """Every parameter in the same order on all ranks of its data-parallel group, and that group."""
    dense = ranks.state.get_data_parallel_group(with_context_parallel=True)
    experts = ranks.state.get_expert_data_parallel_group()
    for inner in optimizer.inner:
        find = _distributed(inner) if isinstance(inner, DistributedOptimizer) else _plain(inner)
        for state in find:
            yield state, dense if getattr(state.parameter, "allreduce", True) else experts


def _distributed(inner: DistributedOptimizer) -> Iterator[_State]:
    ranges = {
        parameter: place["param"]
        for buffer in inner.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for parameter, place in bucket["param_map"].items()
    }
    for buffer in inner.buffers:
        for parameter in buffer.param_index_map:
            if parameter not in ranges:
                yield _State(parameter, 0, 0, True, {})
                continue
            tensors = inner._get_main_param_and_optimizer_states(parameter)
            yield _State(parameter, ranges[parameter].start, ranges[parameter].end, True, _flat(tensors))


def _plain(inner: Any) -> Iterator[_State]:
    """An optimizer with all of the state on every rank."""
    main_to_model = {
        main: model
        for model_group, main_group in zip(
            getattr(inner, "float16_groups", ()), getattr(inner, "fp32_from_float16_groups", ()), strict=True
        )
        for model, main in zip(model_group, main_group, strict=True)
    }
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            tensors = {"param": main, **inner.optimizer.state[main]}
            parameter = main_to_model.get(main, main)
            yield _State(parameter, 0, parameter.numel(), False, _flat(tensors))


def _flat(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().view(-1) for name, tensor in tensors.items() if name != "step"}


def _blocks(
    states: Iterator[tuple[_State, dist.ProcessGroup]],
) -> Iterator[list[tuple[_State, dist.ProcessGroup]]]:
    block: list[tuple[_State, dist.ProcessGroup]] = []
    size = 0
    for state, group in states:
        block.append((state, group))
        size += state.parameter.numel() * 4 * 3
        if size > BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
